"`spectrum-merge --repair`: what is fitted on whose inputs, written like any merge, and told apart from what is proved."
import csv, json, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
import transformers as T
from spectrum_merging.checkpoint import Checkpoint
from spectrum_merging.fitted import Network, batches_of, merge_fitted
from spectrum_merging.match import match_layers
from spectrum_merging.merge import load_model, load_task, merge
from spectrum_merging.plan import FITTED, Plan, make_plan
from spectrum_merging.unlabelled import read_inputs
from spectrum_merging.verify import verify

words = ['[PAD]','[UNK]',*'a film of no great depth but much wit and some charm in its slow and lovely end'.split()]
vocab = {w: i for i,w in enumerate(dict.fromkeys(words))}
small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)

def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    tok = Tokenizer(models.WordLevel(vocab, '[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='[PAD]', unk_token='[UNK]', eos_token='[UNK]')

def save(folder, cls, config, seed, dtype=torch.float32, reads=None):
    "An expert of one base: what `seed` has moved"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = cls(config).eval()
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters(): p.data += .1*torch.randn(p.shape, generator=g)*bool(seed)
    net.to(dtype).save_pretrained(folder)
    (reads or tokenizer()).save_pretrained(folder)
    return str(folder)

def sentences(n, seed=0):
    g = np.random.default_rng(seed)
    return [' '.join(g.choice(list(vocab)[2:], g.integers(3, 9))) for _ in range(n)]

def table(path, rows, header=('Nr','Kundentext','Sterne'), sep=','):
    with open(path, 'w', newline='', encoding='utf-8') as f:
        out = csv.writer(f, delimiter=sep)
        out.writerow(header)
        for i,o in enumerate(rows): out.writerow([i, o, 5])
    return path

@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "Two BERT experts with 2 and 5 classes, their base, and a table of each"
    d = tmp_path_factory.mktemp('texts')
    def config(n): return T.BertConfig(**small, vocab_size=len(vocab), max_position_embeddings=20, num_labels=n)
    save(d/'base', T.BertForSequenceClassification, config(2), 0)
    for i,(t,n) in enumerate(dict(mood=2, topic=5).items()): save(d/t, T.BertForSequenceClassification, config(n), i+1)
    table(d/'mood.csv', sentences(130), sep=';')
    (d/'topic.jsonl').write_text(''.join(json.dumps(dict(Überschrift=o, n=i))+'\n' for i,o in enumerate(sentences(90, 1))))
    return d

def models(d): return dict(mood=str(d/'mood'), topic=str(d/'topic'))
def inputs(d): return dict(mood=d/'mood.csv', topic=d/'topic.jsonl')
def run(name, *args): return subprocess.run([Path(sys.executable).parent/name, *map(str, args)], capture_output=True, text=True)

def test_command(here, tmp_path):
    "The whole of it: what is said, written, loaded, proved; what was fitted is never called proved"
    out = tmp_path/'out'
    p = run('spectrum-merge', *(f'{t}={o}' for t,o in models(here).items()), '--base', here/'base', '--out', out, '--strategy', 'task_arithmetic',
        '--repair', 'match', 'heads(ridge=0.1)', '--inputs', *(f'{t}={o}' for t,o in inputs(here).items()))
    assert p.returncode==0, p.stderr
    assert "mood: 130 of 130 texts in mood.csv, column 'Kundentext'" in p.stdout and "column 'Überschrift'" in p.stdout
    df = Plan.load(out/'plan.csv').table.set_index('name')
    fitted = set(df.index[df.op==FITTED])
    assert 'bert.encoder.layer.1.output.dense.weight' in fitted and 'classifier.bias@topic' in fitted
    assert not any('embeddings' in k or 'LayerNorm' in k for k in fitted)
    told = json.loads((out/'merge.json').read_text())['fitted']
    assert [o['repair'] for o in told['repairs']]==['match','refit(ridge=0.1)']
    from hashlib import sha256
    assert told['inputs']['topic']['sha256']==sha256((here/'topic.jsonl').read_bytes()).hexdigest()
    assert (told['inputs']['mood']['used'], told['inputs']['mood']['column'])==(130, 'Kundentext')
    proof = run('spectrum-verify', out, '--all')
    assert proof.returncode==0 and f'{len(fitted)} were fitted to inputs and are not proved' in proof.stdout, proof.stdout+proof.stderr
    assert f'{len(df)-len(fitted)} of {len(df)} tensors made again' in proof.stdout
    assert load_model(out, 'topic').classifier.weight.shape==(5, 16)
    assert load_task(out, 'mood')['classifier.weight'].equal(load_model(out, 'mood').classifier.weight)
    card = (out/'README.md').read_text()
    assert 'fitted of' in card and 'Kundentext' in card

def test_like_the_function(here, tmp_path):
    "The folder holds what `match_layers` gives on the same inputs; the same command writes the same bytes"
    plan = make_plan('standard', models(here))
    out,again = (merge_fitted(plan, models(here), out=tmp_path/k, repairs='match', inputs=inputs(here)) for k in 'ab')
    assert (out/'model.safetensors').read_bytes()==(again/'model.safetensors').read_bytes()
    plain = merge(plan, models(here), out=tmp_path/'plain')
    nets = {t: Network(t, Checkpoint(o)) for t,o in models(here).items()}
    batches = {t: batches_of(nets[t], read_inputs(inputs(here)[t], t)) for t in nets}
    want = match_layers(load_model(plain, 'mood').float(), {t: o.expert() for t,o in nets.items()}, batches)['mood'].state_dict()
    found = load_task(out, 'mood')
    assert all(v.allclose(want[k], atol=1e-6) for k,v in found.items())
    start = load_task(plain, 'mood')
    df = Plan.load(out/'plan.csv').table.set_index('name')
    for k,v in found.items(): assert v.equal(start[k])==(df.op.get(k, df.op.get(f'{k}@mood'))!=FITTED), k

def test_tampering(here, tmp_path):
    "A fitted tensor has its checksum, and a manifest that does not say what was fitted is refused"
    out = merge_fitted(make_plan('standard', models(here)), models(here), out=tmp_path/'out', repairs=['match'], inputs=inputs(here))
    raw = bytearray((out/'model.safetensors').read_bytes())
    raw[-3] ^= 1
    (out/'model.safetensors').write_bytes(raw)
    bad = verify(out)
    assert list(bad.found[~bad.ok].str.contains('other checksum'))==[True]
    raw[-3] ^= 1
    (out/'model.safetensors').write_bytes(raw)
    from spectrum_merging.folder import sealed
    told = json.loads((out/'merge.json').read_text())
    del told['fitted']
    (out/'merge.json').write_text(json.dumps(told | dict(seal=sealed(told))))
    bad = verify(out)
    assert list(bad.check[~bad.ok])==['says what was fitted']
    plan = Plan.load(out/'plan.csv')
    with pytest.raises(ValueError, match='was fitted to inputs.*no plan'): merge(plan, models(here))

@pytest.mark.parametrize('strategy', ['regmean','ridge_mean','slerp'])
def test_strategies(here, tmp_path, strategy):
    "RegMean takes its moments from the inputs, alone or before a repair; what they made is not proved either"
    plan = make_plan(strategy, models(here), str(here/'base'))
    repairs = [] if strategy=='regmean' else ['heads']
    out = merge_fitted(plan, models(here), str(here/'base'), tmp_path/'out', repairs=repairs, inputs=inputs(here))
    df = Plan.load(out/'plan.csv').table.set_index('name')
    assert verify(out, all=True).ok.all()
    asks = strategy=='regmean'
    assert (df.op[df.role=='matrix']==FITTED).all()==asks and (df.op[df.role=='head']==FITTED).all()!=asks
    if asks: assert df.reason['bert.pooler.dense.weight']=='regmean, by moments of the inputs'

def test_decoders_in_bf16(tmp_path):
    "GPT-2 with a tied output layer: Conv1D is fitted, the table is not; fitted in float32, stored in bfloat16"
    config = T.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=len(vocab), n_positions=20, bos_token_id=1, eos_token_id=1)
    own = {t: save(tmp_path/t, T.GPT2LMHeadModel, config, i+1, torch.bfloat16) for i,t in enumerate('ab')}
    given = {t: tmp_path/f'{t}.txt' for t in own}
    for i,(t,f) in enumerate(given.items()): f.write_text('\n'.join(sentences(60, i)))
    out = merge_fitted(make_plan('standard', own), own, out=tmp_path/'out', repairs=['match'], inputs=given)
    df = Plan.load(out/'plan.csv').table.set_index('name')
    names = set(df.index[df.op==FITTED])
    assert 'transformer.h.1.mlp.c_fc.weight' in names and not any('wte' in k or 'lm_head' in k for k in names)
    assert {o.dtype for o in Checkpoint(out).infos.values()}=={'bfloat16'} and verify(out).ok.all()
    net = load_model(out)
    assert net.lm_head.weight.data_ptr()==net.transformer.wte.weight.data_ptr()

def pictures(folder, seed, n=40):
    from PIL import Image
    folder.mkdir()
    g = np.random.default_rng(seed)
    for i in range(n): Image.fromarray(g.integers(0, 255, (20, 20, 3), dtype='u1')).save(folder/f'{i:02}.png')
    return folder

def test_images(tmp_path):
    "A ResNet and folders of images: statistics per task lie with the heads, all of it loads and is checked"
    config = lambda n: T.ResNetConfig(embedding_size=8, hidden_sizes=[8,16], depths=[1,1], layer_type='basic', num_labels=n)
    reads = T.AutoImageProcessor.from_pretrained
    from transformers import ViTImageProcessor
    make = ViTImageProcessor(size=dict(height=16, width=16))
    own = {t: save(tmp_path/t, T.ResNetForImageClassification, config(n), n, reads=make) for t,n in dict(cats=2, dogs=3).items()}
    given = {t: pictures(tmp_path/f'{t} pictures', i) for i,t in enumerate(own)}
    plan = make_plan('standard', own)
    for repairs in (['batchnorm'], ['repair'], ['match','batchnorm(statistics=shared)','heads']):
        out = merge_fitted(plan, own, out=tmp_path/repairs[0], repairs=repairs, inputs=given)
        df = Plan.load(out/'plan.csv').table.set_index('name')
        per_task = 'resnet.embedder.embedder.normalization.running_mean@cats' in df.index
        assert per_task==(len(repairs)==1) and verify(out, all=True).ok.all()
        a,b = (load_model(out, t).resnet.embedder.embedder.normalization.running_mean for t in own)
        assert a.equal(b)!=per_task
    with pytest.raises(ValueError, match='reads images, .*holds texts'):
        merge_fitted(plan, own, out=tmp_path/'no', repairs=['match'], inputs={t: table(tmp_path/f'{t}.csv', sentences(30)) for t in own})

def test_adapters(here, tmp_path):
    "Experts that are LoRA adapters are opened with their base"
    from peft import LoraConfig, get_peft_model
    own = {}
    for i,t in enumerate(('mood', 'topic')):
        net = T.BertForSequenceClassification.from_pretrained(here/'base')
        net = get_peft_model(net, LoraConfig(r=2, target_modules=['query','value'], task_type='SEQ_CLS', init_lora_weights=False))
        net.save_pretrained(tmp_path/t)
        own[t] = str(tmp_path/t)
    base = str(here/'base')
    out = merge_fitted(make_plan('standard', own, base), own, base, tmp_path/'out', repairs=['match'], inputs=inputs(here))
    assert verify(out, all=True).ok.all() and (Plan.load(out/'plan.csv').table.op==FITTED).any()

@pytest.mark.parametrize('change,words', [
    (dict(inputs=None), '--repair|none are given'), (dict(inputs=dict(mood='mood.csv')), 'topic has no inputs'),
    (dict(inputs=dict(mood='mood.csv', topic='topic.jsonl', cow='mood.csv')), "inputs are given for 'cow', the models are mood, topic"),
    (dict(inputs=dict(mood='mood.csv', topic='lost.csv')), 'lost.csv, are not there'), (dict(inputs=dict(mood='mood.csv', topic='few.csv')), 'holds 5 inputs'),
    (dict(text=dict(mood='txt')), "no column 'txt': choose from Nr, Kundentext, Sterne"), (dict(text=dict(mod='txt')), "text is given for 'mod'"),
    (dict(text=dict(mood='Sterne')), "'Sterne' holds no texts"), (dict(inputs=dict(mood='mood.csv', topic='numbers.csv')), 'no column of texts'),
    (dict(inputs=dict(mood='mood.csv', topic='broken.csv')), 'row 3 .* has 4 cells'), (dict(inputs=dict(mood='mood.csv', topic='file.xlsx')), 'are no .csv'),
    (dict(inputs=dict(mood='mood.csv', topic='broken.parquet')), 'is no parquet'), (dict(inputs=dict(mood='mood.csv', topic='broken.jsonl')), 'line 2'),
    (dict(repairs=['batchnorm']), 'has no BatchNorm'), (dict(repairs=['mend']), "unknown"), (dict(repairs=['match(ridge=-1)']), 'ridge'),
    (dict(repairs=[]), 'nothing looks at them')], ids=str)
def test_refused_before_any_work(here, tmp_path, change, words):
    table(here/'few.csv', sentences(5))
    table(here/'numbers.csv', range(40))
    (here/'broken.csv').write_text('a,b\nx,y\nx,y\nx,y,z,w\n')
    (here/'file.xlsx').write_bytes(b'PK')
    (here/'broken.parquet').write_bytes(b'PAR1')
    (here/'broken.jsonl').write_text('{"text": "a"}\n{"text":\n')
    given = dict(repairs=['match'], inputs=inputs(here)) | change
    if given['inputs']: given['inputs'] = {t: here/f for t,f in given['inputs'].items()}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        merge_fitted(make_plan('standard', models(here)), models(here), out=tmp_path/'out', **given)
    assert not list(tmp_path.iterdir())

def test_refused_by_the_command(here, tmp_path):
    p = run('spectrum-merge', *models(here).values(), '--out', tmp_path/'out', '--repair', 'match', '--inputs', here/'mood.csv')
    assert p.returncode==2 and 'write --inputs NAME=' in p.stderr and len(p.stderr.strip().splitlines())==1
    assert not list(tmp_path.iterdir())

def test_what_transformers_does_not_open(here, tmp_path):
    "State dicts of torchvision, and folders without a tokenizer"
    from safetensors.torch import save_file
    for t in 'ab': save_file({'fc.weight': torch.ones(2, 3), 'conv1.weight': torch.ones(3, 3, 3, 3)}, tmp_path/f'{t}.safetensors')
    own = {t: str(tmp_path/f'{t}.safetensors') for t in 'ab'}
    given = dict(a=here/'mood.csv', b=here/'mood.csv')
    with pytest.raises(ValueError, match='names no class of transformers.*match_layers'):
        merge_fitted(make_plan('standard', own), own, out=tmp_path/'out', repairs=['batchnorm'], inputs=given)
    for t in 'ab':
        (tmp_path/t).mkdir()
        for f in ('config.json', 'model.safetensors'): (tmp_path/t/f).write_bytes((here/'mood'/f).read_bytes())
    own = {t: str(tmp_path/t) for t in 'ab'}
    with pytest.raises(ValueError, match='has no tokenizer in its folder'):
        merge_fitted(make_plan('standard', own), own, out=tmp_path/'out', repairs=['match'], inputs=given)

def test_nothing_half_written(here, tmp_path, monkeypatch):
    "A disk that is full leaves no folder"
    from spectrum_merging import fitted
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('spectrum_merging.folder.Partial.open', full)
    with pytest.raises(OSError): merge_fitted(make_plan('standard', models(here)), models(here), out=tmp_path/'out', repairs=['heads'], inputs=inputs(here))
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('name,make,column,first', [
    ('a.csv', lambda f: f.write_text('text,label\n'+'"one, two",1\n'*20), 'text', 'one, two'),
    ('b.tsv', lambda f: f.write_text('sentence\tlabel\n'+'NA\t1\n'*20), 'sentence', 'NA'),
    ('c.csv', lambda f: f.write_text('\ufefftitle;body\n'+'x;a longer text\n'*20, encoding='utf-8'), 'body', 'a longer text'),
    ('d.json', lambda f: f.write_text(json.dumps(['one']*20)), 'text', 'one'),
    ('e.json', lambda f: f.write_text(json.dumps(dict(data=[dict(q='what is it', n=3)]*20))), 'q', 'what is it'),
    ('f.jsonl', lambda f: f.write_text('{"premise": "a", "hypothesis": "b"}\n'*20), 'premise,hypothesis', ('a', 'b')),
    ('g.parquet', lambda f: __import__('pandas').DataFrame(dict(id=range(20), review=['good']*20)).to_parquet(f), 'review', 'good')],
    ids=lambda o: o if isinstance(o, str) else None)
def test_files(tmp_path, name, make, column, first):
    make(tmp_path/name)
    found = read_inputs(tmp_path/name, 'a')
    assert (found.column, found.items[0], found.found)==(column, first, 20)
