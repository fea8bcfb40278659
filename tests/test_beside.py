"What lies beside the weights: copied, compared, brought up to date, and usable by the libraries that wrote it."
import json, os, pytest, shutil, subprocess, sys
from pathlib import Path
import torch, transformers as t
from safetensors.torch import load_file, save_file
from spectrum_merging.beside import config_conflicts, files_beside
from spectrum_merging.checkpoint import Checkpoint
from spectrum_merging.merge import load_task, merge
from spectrum_merging.plan import make_plan
from spectrum_merging.preflight import PreflightError
from spectrum_merging.verify import verify

scripts = Path(sys.executable).parent
small = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)

def llama(d, seed, dtype=torch.float32, **how):
    torch.manual_seed(seed)
    m = t.LlamaForCausalLM(t.LlamaConfig(**(small | dict(num_key_value_heads=2) | how))).to(dtype).eval()
    m.save_pretrained(d)
    return m

def bert(d, seed, cls=t.BertForSequenceClassification, **how):
    torch.manual_seed(seed)
    m = cls(t.BertConfig(**(small | dict(max_position_embeddings=40) | how))).eval()
    m.save_pretrained(d)
    return m

def merged(tmp_path, *names, **how):
    paths = [tmp_path/k for k in names]
    return merge(make_plan('standard', paths), paths, out=tmp_path/'out', **how)

def test_everything_but_weights_and_training_state(tmp_path):
    "Subfolders, vocabularies of any suffix, code; nothing of the training, nothing hidden, no link that leaves the folder"
    kept = ['bpe.codes','source.spm','qwen.tiktoken','cuda_256.cpp','additional_chat_templates/tool.jinja','deep/er/file.xyz','spiece.model']
    lost = ['optimizer.pt','rng_state_0.pth','trainer_state.json','all_results.json','checkpoint-5/config.json','runs/events.out.tfevents.1',
        '.gitattributes','.cache/x','pytorch_model.bin.index.json','tf_model.h5','model.onnx']
    for i,k in enumerate('ab'):
        bert(tmp_path/k, i)
        for f in kept+lost:
            (tmp_path/k/f).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/k/f).write_text('{}')
    (tmp_path/'secret').write_text('s')
    (tmp_path/'a'/'leak.txt').symlink_to(tmp_path/'secret')
    os.mkfifo(tmp_path/'a'/'pipe')
    out = merged(tmp_path, 'a', 'b')
    assert all((out/f).is_file() for f in kept) and not any((out/f).exists() for f in [*lost, 'leak.txt', 'pipe'])
    assert 'leak.txt' in (out/'README.md').read_text() and verify(out, all=True).ok.all()

@pytest.mark.parametrize('field,value', [('rope_parameters', dict(rope_type='default', rope_theta=1e6)), ('hidden_act', 'gelu'),
    ('rms_norm_eps', 1e-3), ('num_key_value_heads', 4)])
def test_fields_that_change_the_computation(field, value, tmp_path):
    "Refused before work, field and values named; with files_from somebody has decided, and the card says so"
    llama(tmp_path/'a', 0)
    llama(tmp_path/'b', 1, **({field: value} if field!='num_key_value_heads' else {}))
    if field=='num_key_value_heads': # the same shapes, other heads
        for k,n in dict(a=4, b=2).items():
            shutil.rmtree(tmp_path/k)
            llama(tmp_path/k, ord(k), num_attention_heads=n, num_key_value_heads=n, head_dim=32//n)
    with pytest.raises(PreflightError, match=field.partition('_')[0]): make_plan('standard', [tmp_path/'a', tmp_path/'b'])
    plan = make_plan('standard', [tmp_path/'a', tmp_path/'b'], files_from='b')
    with pytest.raises(PreflightError): merge(plan, [tmp_path/'a', tmp_path/'b'], out=tmp_path/'out')
    assert not (tmp_path/'out').exists()
    out = merge(plan, [tmp_path/'a', tmp_path/'b'], out=tmp_path/'out', files_from='b')
    assert field.partition('_')[0] in (out/'README.md').read_text()
    assert json.loads((out/'config.json').read_text())==json.loads((tmp_path/'b'/'config.json').read_text())

@pytest.mark.parametrize('how', [dict(attention_dropout=.3), dict(use_cache=False), dict(initializer_range=.5), dict(eos_token_id=7)])
def test_fields_that_do_not(how, tmp_path):
    "Training and generation: noted, not refused"
    llama(tmp_path/'a', 0)
    llama(tmp_path/'b', 1, **how)
    out = merged(tmp_path, 'a', 'b')
    assert next(iter(how)) in (out/'README.md').read_text()

def test_defaults_spelled_out_or_not(tmp_path):
    "A field that an older file leaves out is its default"
    for i,k in enumerate('ab'): llama(tmp_path/k, i)
    old = json.loads((tmp_path/'b'/'config.json').read_text())
    for k in ('rope_parameters','attention_bias','mlp_bias','rms_norm_eps'): old.pop(k, None)
    (tmp_path/'b'/'config.json').write_text(json.dumps(old | dict(rope_theta=10000.)))
    assert config_conflicts({k: Checkpoint(tmp_path/k) for k in 'ab'})[0]==[]
    (tmp_path/'b'/'config.json').write_text(json.dumps(old | dict(rope_theta=5e5)))
    assert [o[0] for o in config_conflicts({k: Checkpoint(tmp_path/k) for k in 'ab'})[0]]==['rope_parameters.rope_theta']

def test_number_types_of_parts(tmp_path):
    "A part's number type says how it was saved, as that of the whole does"
    for k,dtype in dict(a='float32', b=None).items():
        llama(tmp_path/k, 0)
        part = dict(model_type='clip_text_model', dtype=dtype)
        (tmp_path/k/'config.json').write_text(json.dumps(dict(model_type='clip', text_config=part)))
    assert config_conflicts({k: Checkpoint(tmp_path/k) for k in 'ab'})==([], [])

def test_tokenizers_in_another_order(tmp_path):
    "The same words with other numbers: refused; the same file: not even read"
    for i,k in enumerate('ab'): bert(tmp_path/k, i)
    words = [f'w{i}' for i in range(60)]
    for k,o in dict(a=words, b=words[::-1]).items(): (tmp_path/k/'vocab.txt').write_text('\n'.join(o)+'\n')
    with pytest.raises(PreflightError, match="token 'w0'"): make_plan('standard', [tmp_path/'a', tmp_path/'b'])
    tok = dict(model=dict(type='Unigram', vocab=[[w, 0.] for w in words]), added_tokens=[])
    for k in 'ab': (tmp_path/k/'tokenizer.json').write_text(json.dumps(tok))
    make_plan('standard', [tmp_path/'a', tmp_path/'b'])

@pytest.mark.parametrize('have,want', [(torch.float16,'float32'), (torch.float16,'bfloat16'), (torch.float32,'bfloat16'), (torch.bfloat16,None)])
def test_configuration_names_the_stored_type(have, want, tmp_path):
    "In the root and in each head's folder"
    for i,k in enumerate('ab'): bert(tmp_path/k, i).to(have).save_pretrained(tmp_path/k)
    paths = dict(x=tmp_path/'a', y=tmp_path/'b')
    out = merge(make_plan('standard', paths), paths, out=tmp_path/'out', dtype=want)
    for at in (out, out/'heads'/'y'):
        assert str(t.AutoModelForSequenceClassification.from_pretrained(at).dtype)[6:]==(want or str(have)[6:])

@pytest.mark.parametrize('order', ['ab','ba'])
def test_tied_in_one_model_only(order, tmp_path):
    "An output layer that any model has of its own is written, and the configuration says that it is not tied"
    ms = dict(a=llama(tmp_path/'x', 1, tie_word_embeddings=True), b=llama(tmp_path/'y', 2))
    for k,m in ms.items():
        (tmp_path/k).mkdir()
        torch.save(m.state_dict(), tmp_path/k/'pytorch_model.bin')
        m.config.save_pretrained(tmp_path/k)
    out = merged(tmp_path, *order)
    got = t.AutoModelForCausalLM.from_pretrained(out).state_dict()
    for k,v in got.items(): torch.testing.assert_close(v, (ms['a'].state_dict()[k]+ms['b'].state_dict()[k])/2)
    assert verify(out, all=True).ok.all() and load_task(out).keys()==got.keys()

def test_slips_are_said(tmp_path):
    "One model twice, a base that is none"
    for i,k in enumerate('abz'): bert(tmp_path/k, i)
    def run(*a): return subprocess.run([scripts/'spectrum-merge', *a], cwd=tmp_path, capture_output=True, text=True)
    p = run('a', 'a', '--out', 'o1')
    assert not p.returncode and 'same numbers' in p.stdout
    p = run('a', 'b', '--base', 'z', '--strategy', 'task_arithmetic', '--out', 'o2')
    assert not p.returncode and 'away from the base' in p.stdout
    p = run('a', 'b', '--strategy', 'snr_winner', '--top', '0.5', '--out', 'o3')
    assert p.returncode and '50' in p.stderr+p.stdout and not (tmp_path/'o3').exists()

def test_paths_with_an_equals_sign(tmp_path):
    "A folder may be called lr=1e-4; a name may have a hyphen"
    for i,k in enumerate(('lr=1e-4','lr=1e-5')): bert(tmp_path/k, i)
    def run(*a): return subprocess.run([scripts/'spectrum-merge', *a], cwd=tmp_path, capture_output=True, text=True)
    assert not run('lr=1e-4', 'lr=1e-5', '--out', 'o1').returncode
    p = run('my-mood=lr=1e-4', 'the.topic=./lr=1e-5', '--out', 'o2')
    assert not p.returncode and (tmp_path/'o2'/'heads'/'the.topic').is_dir(), p.stderr

def sentences(d, seed):
    "A sentence-transformers model with weights in a subfolder"
    st = pytest.importorskip('sentence_transformers')
    from transformers import BertTokenizerFast
    torch.manual_seed(seed)
    bert(d/'bert', seed, t.BertModel)
    (d/'bert'/'vocab.txt').write_text('\n'.join(['[PAD]','[UNK]','[CLS]','[SEP]','[MASK]',*(f'w{i}' for i in range(55))])+'\n')
    BertTokenizerFast(str(d/'bert'/'vocab.txt')).save_pretrained(d/'bert')
    from sentence_transformers.sentence_transformer import modules
    word = modules.Transformer(str(d/'bert'))
    dense = modules.Dense(32, 8)
    m = st.SentenceTransformer(modules=[word, modules.Pooling(32), dense], device='cpu')
    m.save(str(d/'st'))
    return m

def test_sentence_transformers(tmp_path):
    "Every module is merged, the result opens with the library, and its Dense layer is the average"
    ms = {k: sentences(tmp_path/k, i) for i,k in enumerate('ab')}
    paths = [tmp_path/k/'st' for k in 'ab']
    out = merge(make_plan('standard', paths), paths, out=tmp_path/'out')
    import sentence_transformers as st
    got = st.SentenceTransformer(str(out), device='cpu')
    a,b,c = ({k: v.clone() for k,v in m.state_dict().items()} for m in (ms['a'], ms['b'], got))
    assert c.keys()==a.keys()
    for k in c: torch.testing.assert_close(c[k], ((a[k].double()+b[k].double())/2).to(c[k].dtype) if a[k].is_floating_point() else a[k])
    assert got.encode('w1 w2').shape==(8,) and verify(out, all=True).ok.all()
    again = merge(make_plan('standard', [out, out]), [out, out], out=tmp_path/'again')
    assert all(v.equal(c[k]) for k,v in st.SentenceTransformer(str(again), device='cpu').state_dict().items())

def test_a_module_that_leaves_the_folder(tmp_path):
    "Names in modules.json are names, never paths"
    for i,k in enumerate('ab'): bert(tmp_path/k, i)
    for bad in ('../b', '/tmp', 'x/y', '..'):
        (tmp_path/'a'/'modules.json').write_text(json.dumps([dict(path=''), dict(path=bad)]))
        with pytest.raises(ValueError, match='no folder beside'): Checkpoint(tmp_path/'a')

def test_timm(tmp_path):
    "A timm folder goes in, and what comes out opens with timm: heads of tasks kept, everything else averaged"
    timm = pytest.importorskip('timm')
    from timm.models import load_checkpoint
    ms = {}
    for i,(k,n) in enumerate(dict(a=3, b=5).items()):
        torch.manual_seed(i)
        ms[k] = timm.create_model('resnet10t', num_classes=n).eval()
        (tmp_path/k).mkdir()
        save_file(ms[k].state_dict(), tmp_path/k/'model.safetensors')
        (tmp_path/k/'config.json').write_text(json.dumps(dict(architecture='resnet10t', num_classes=n, num_features=512)))
    paths = {k: tmp_path/k for k in 'ab'}
    out = merge(make_plan('standard', paths), paths, out=tmp_path/'out')
    for k,n in dict(a=3, b=5).items():
        got = timm.create_model('resnet10t', num_classes=n)
        got.load_state_dict(load_task(out, k))
        assert got.state_dict()['fc.weight'].equal(ms[k].state_dict()['fc.weight'])
