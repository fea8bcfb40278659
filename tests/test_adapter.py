"Adapters against the real PEFT: opened as a model, measured, merged, proven, and refused by name."
import json, os, resource, subprocess, sys, warnings
from pathlib import Path
import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn
from spectrum_merging.checkpoint import Checkpoint
from spectrum_merging.merge import merge
from spectrum_merging.plan import make_plan
from spectrum_merging.scan import scan
from spectrum_merging.stream import plan_rows
from spectrum_merging.verify import verify

peft = pytest.importorskip('peft')
tf = pytest.importorskip('transformers')
warnings.filterwarnings('ignore')

def _bert(**kwargs):
    return tf.BertForSequenceClassification(tf.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, vocab_size=99, max_position_embeddings=40, **kwargs))
def _gpt(): return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=77, n_positions=40,
    bos_token_id=0, eos_token_id=0))
def _llama(): return tf.LlamaForCausalLM(tf.LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=48, vocab_size=99, bos_token_id=0, eos_token_id=0, pad_token_id=0))
def _t5(): return tf.T5ForConditionalGeneration(tf.T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, vocab_size=99))
def _distil(): return tf.DistilBertForTokenClassification(tf.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=99))
def _vit(): return tf.ViTForImageClassification(tf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=48, image_size=16, patch_size=4))
makers = dict(bert=_bert, gpt=_gpt, llama=_llama, t5=_t5, distil=_distil, vit=_vit)

def random_(model, seed):
    "Give all that is trained a value of its own: PEFT begins at B = 0"
    g = torch.Generator().manual_seed(seed)
    for k,p in model.named_parameters():
        if p.requires_grad or 'lora' in k: p.data.copy_(p.data+torch.randn(p.shape, generator=g)*.1)

def make(tmp, maker, seed=0, dtype=torch.float32, name='a', **config):
    "Folders of base and adapter, and what `merge_and_unload` makes of them"
    torch.manual_seed(7)
    base = makers[maker]().to(dtype)
    if not (tmp/'base').exists(): base.save_pretrained(tmp/'base')
    model = peft.get_peft_model(base, peft.LoraConfig(**config))
    random_(model, seed)
    model.save_pretrained(tmp/name)
    again = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp/'base', dtype=dtype), tmp/name)
    again.merge_and_unload().save_pretrained(tmp/f'{name}-merged')
    return tmp/'base',tmp/name,load_file(tmp/f'{name}-merged'/'model.safetensors')

def same(ckpt, want):
    assert len(ckpt)>5
    for k in ckpt:
        assert ckpt.read(k).dtype==want[k].dtype and torch.equal(ckpt.read(k), want[k]), k

cases = dict(
    bert=('bert', dict(r=4, target_modules=['query','value'], task_type='SEQ_CLS')),
    all_bias=('bert', dict(r=4, target_modules=['query','value'], bias='all', task_type='SEQ_CLS')),
    lora_only=('bert', dict(r=4, target_modules=['query','dense'], bias='lora_only', modules_to_save=['classifier'])),
    lora_bias=('bert', dict(r=4, target_modules=['query','value'], lora_bias=True)),
    patterns=('bert', dict(r=4, lora_alpha=3, target_modules=['query','value','dense'], use_rslora=True,
        rank_pattern={'query': 2, r'layer\.1\.attention\.output\.dense': 7}, alpha_pattern={r'layer\.0.*value': 9, 'query': 5})),
    table=('bert', dict(r=5, target_modules=['word_embeddings','query'])),
    saved=('bert', dict(r=4, target_modules=['query'], modules_to_save=['pooler','classifier','LayerNorm'])),
    all_linear=('bert', dict(r=16, target_modules='all-linear', task_type='SEQ_CLS')),
    gpt=('gpt', dict(r=4, target_modules=['c_attn','c_proj','c_fc'], fan_in_fan_out=True, task_type='CAUSAL_LM')),
    gpt_square=('gpt', dict(r=4, target_modules=r'.*attn\.c_proj', task_type='CAUSAL_LM')),
    gpt_table=('gpt', dict(r=4, target_modules=['wte','c_attn'])),
    llama=('llama', dict(r=8, lora_alpha=32, use_rslora=True, target_modules='all-linear', task_type='CAUSAL_LM')),
    llama_table=('llama', dict(r=8, target_modules=['embed_tokens','q_proj'], modules_to_save=['lm_head'])),
    eva=('llama', dict(r=8, target_modules=['q_proj'], init_lora_weights='orthogonal')),
    t5=('t5', dict(r=4, target_modules=['q','v','wi','wo'], task_type='SEQ_2_SEQ_LM')),
    distil=('distil', dict(r=4, target_modules=['q_lin','v_lin'], task_type='TOKEN_CLS')),
    vit=('vit', dict(r=4, target_modules=['q_proj','v_proj','query','value'], modules_to_save=['classifier'])))

@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize('case', cases)
def test_equals_peft(case, dtype, tmp_path):
    if case=='t5' and dtype==torch.float16: pytest.skip('T5 keeps some weights in fp32 there')
    maker,config = cases[case]
    base,adapter,want = make(tmp_path, maker, dtype=dtype, **config)
    ckpt = Checkpoint(adapter, base)
    assert set(ckpt)==set(Checkpoint(base))
    same(ckpt, want)
    assert any(not torch.equal(ckpt.read(k), Checkpoint(base).read(k)) for k in ckpt)

def two(tmp_path, maker='bert', dtype=torch.float32, **config):
    config = config or dict(r=4, target_modules=['query','value'], task_type='SEQ_CLS')
    base,a,x = make(tmp_path, maker, 1, dtype, 'a', **config)
    _,b,y = make(tmp_path, maker, 2, dtype, 'b', **config)
    return base,a,b,x,y

@pytest.fixture(scope='session', autouse=True)
def commands(tmp_path_factory):
    "Console scripts as an installation makes them"
    folder = tmp_path_factory.mktemp('bin')
    for k in ('merge','scan','verify','extract'):
        (folder/f'spectrum-{k}').write_text(f'from spectrum_merging.cli import {k}_cli\n{k}_cli()\n')
    return folder

@pytest.fixture
def run(commands):
    def run(*args):
        p = subprocess.run([sys.executable, commands/args[0], *map(str, args[1:])], capture_output=True, text=True)
        return p.returncode,p.stdout+p.stderr
    return run

def test_products_are_merged(tmp_path, run):
    "By the command, with its proof; the mean of products is no product of mean factors"
    base,a,b,x,y = two(tmp_path)
    code,said = run('spectrum-merge', a, b, '--base', base, '--out', tmp_path/'o')
    assert not code, said
    o = load_file(tmp_path/'o'/'model.safetensors')
    assert len(o)>30
    for k,v in o.items(): torch.testing.assert_close(v, (x[k].double()+y[k].double()).div(2).float(), rtol=1e-6, atol=1e-7)
    assert not (tmp_path/'o'/'adapter_config.json').exists()
    code,said = run('spectrum-verify', tmp_path/'o', '--all')
    assert not code, said
    assert verify(tmp_path/'o', all=True).ok.all()
    alpha = a/'adapter_config.json'
    alpha.write_text(alpha.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    assert not verify(tmp_path/'o', all=True).ok.all()

@pytest.mark.parametrize('strategy', ('standard','task_arithmetic','tsv_m','snr_winner','ties'))
def test_mixed_with_full_models(strategy, tmp_path):
    "An adapter is what its merged model is, alone and beside full models; verified with its base moved"
    base,a,b,x,y = two(tmp_path)
    save_file(y, tmp_path/'full.safetensors')
    plan = make_plan(strategy, dict(a=a, b=tmp_path/'full.safetensors'), base)
    out = merge(plan, dict(a=a, b=tmp_path/'full.safetensors'), base, tmp_path/'out')
    held = merge(plan, dict(a=x, b=y), load_file(base/'model.safetensors'))
    for k,v in load_file(out/'model.safetensors').items(): torch.testing.assert_close(v, held[k], rtol=1e-6, atol=1e-7)
    os.rename(base, tmp_path/'moved')
    with pytest.raises(FileNotFoundError): verify(out)
    assert verify(out, base=tmp_path/'moved').ok.all()

def test_untouched_tensors_are_copied(tmp_path):
    "What no adapter changes is the base's, and no operation is run for it"
    base,a,b,_,_ = two(tmp_path, 'llama', torch.bfloat16, r=2, target_modules=['q_proj'])
    plan = make_plan('ties', [a, b], base)
    own = Checkpoint(base)
    rows = plan_rows(plan, {k: Checkpoint(o, own) for k,o in dict(a=a, b=b).items()}, own)
    assert {r.key for r in rows if r.coefs!={'base': 1.}}=={k for k in own if 'q_proj' in k}
    found,start = load_file(merge(plan, [a, b], base, tmp_path/'out')/'model.safetensors'),load_file(base/'model.safetensors')
    assert all(torch.equal(v, start[k])==('q_proj' not in k) for k,v in found.items())
    assert verify(tmp_path/'out', all=True).ok.all()

def test_blocks_do_not_matter(tmp_path):
    base,a,_ = make(tmp_path, 'llama', r=8, target_modules='all-linear')
    ckpt = Checkpoint(a, base)
    for k,o in ckpt.infos.items():
        whole = np.empty(o.nbytes, 'u1')
        ckpt.read_into(k, whole)
        for start,stop in ((0, 4), (12, 400), (o.nbytes//2//4*4, o.nbytes), (4*33, 4*77), (5, 30)):
            stop = min(stop, o.nbytes)
            if start>=stop: continue
            part = np.empty(stop-start, 'u1')
            ckpt.read_into(k, part, start)
            assert np.array_equal(part, whole[start:stop]), (k, start)

def tuned(tmp, maker, seed=3, dtype=torch.float32, rank=3, noise=.004, heads=True):
    "Folders of a base and of a fine-tuned model: a strong update of low rank in noise, all biases and norms changed"
    torch.manual_seed(7)
    base = makers[maker]().to(dtype)
    base.save_pretrained(tmp/'base')
    g = torch.Generator().manual_seed(seed)
    for k,p in base.named_parameters():
        if p.dim()==2: p.data += (.3*torch.randn(p.shape[0], rank, generator=g)@torch.randn(rank, p.shape[1], generator=g)/p.shape[1]**.5
            + noise*torch.randn(p.shape, generator=g)).to(dtype)
        elif heads: p.data += (.05*torch.randn(p.shape, generator=g)).to(dtype)
    base.save_pretrained(tmp/'tuned')
    return tmp/'base',tmp/'tuned',base

def answer(model, maker):
    g = torch.Generator().manual_seed(0)
    if maker=='vit': return model.eval()(pixel_values=torch.randn(2, 3, 16, 16, generator=g)).logits
    ids = torch.randint(1, 70, (2, 9), generator=g)
    more = dict(decoder_input_ids=ids) if maker=='t5' else {}
    return model.eval()(input_ids=ids, **more).logits

@pytest.mark.parametrize('maker', makers)
@pytest.mark.parametrize('how', (dict(), dict(rank=32), dict(energy=.95), dict(threshold=.2)), ids=str)
def test_extract_loads_in_peft(maker, how, tmp_path):
    "What PEFT makes of the adapter is what `Checkpoint` makes of it; at full rank all but what is said to be left out is there"
    from spectrum_merging.extract import extract
    base,model,full = tuned(tmp_path, maker)
    table = extract(model, base, tmp_path/'adapter', **how)
    left = table[table.becomes.str.startswith('left out')]
    started = type(full).from_pretrained(base)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        loaded = peft.PeftModel.from_pretrained(started, tmp_path/'adapter')
    assert not [o for o in said if 'missing' in str(o.message).lower() or 'unexpected' in str(o.message).lower()]
    before = answer(loaded, maker)
    loaded.merge_and_unload().save_pretrained(tmp_path/'again')
    torch.testing.assert_close(answer(type(full).from_pretrained(tmp_path/'again'), maker), before, rtol=1e-4, atol=1e-4)
    ours,theirs = Checkpoint(tmp_path/'adapter', base),load_file(tmp_path/'again'/'model.safetensors')
    same(ours, theirs)
    want = load_file(model/'model.safetensors')
    for k in want:
        if k in set(left.name): continue
        err = (theirs[k]-want[k]).norm()/max((want[k]-Checkpoint(base).read(k)).norm(), 1e-9)
        assert err < (1e-4 if 'rank' in how else .35), (k, float(err))
    if maker in ('bert','distil','vit') and 'rank' in how:
        assert not [o for o in left.name if 'cls_token' not in o and 'position_embeddings' not in o], left
        if maker!='vit': torch.testing.assert_close(before, answer(full, maker), rtol=1e-3, atol=1e-3)

def test_edge_finds_the_rank(tmp_path):
    from spectrum_merging.extract import extract
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    W = {f'a.{i}.weight': torch.randn(120, 200, generator=g) for i in range(4)}
    T = {k: v+.3*torch.randn(120, i, generator=g)@torch.randn(i, 200, generator=g)+.2*torch.randn(v.shape, generator=g) if i else v+.2*torch.randn(v.shape, generator=g)
        for i,(k,v) in enumerate(W.items())}
    t = extract(T, W, tmp_path/'x').set_index('name')
    assert t['rank'].tolist()==[0, 1, 2, 3] and t.becomes.iloc[0].startswith('left out')
    config = json.loads((tmp_path/'x'/'adapter_config.json').read_text())
    assert config['alpha_pattern']==config['rank_pattern'] and config['r']==config['lora_alpha']
    assert len(config['target_modules'])==3

def test_extract_command_and_as_adapter(tmp_path, run):
    base,a,b,x,y = two(tmp_path)
    code,said = run('spectrum-extract', a, '--base', base, '--out', tmp_path/'again', '--rank', 8)
    assert not code and 'PeftModel' in said, said
    for k,v in x.items(): torch.testing.assert_close(Checkpoint(tmp_path/'again', base).read(k), v, rtol=1e-5, atol=1e-6)
    code,said = run('spectrum-merge', a, b, '--base', base, '--out', tmp_path/'m', '--as-adapter', '--heads', 'none')
    assert not code, said
    found = Checkpoint(tmp_path/'m', base)
    assert set(found)==set(x) and sorted(p.name for p in tmp_path.glob('.*'))==[]
    code,said = run('spectrum-merge', f'a={a}', f'b={b}', '--base', base, '--out', tmp_path/'t', '--as-adapter')
    assert not code, said
    assert sorted(p.name for p in (tmp_path/'t').iterdir())==['a', 'b']
    assert torch.equal(Checkpoint(tmp_path/'t'/'b', base).read('classifier.weight'), y['classifier.weight'])
    code,said = run('spectrum-merge', a, b, '--out', tmp_path/'u', '--as-adapter')
    assert code and 'base' in said

@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16), ids=str)
def test_scan_is_rank_exact(dtype, tmp_path):
    "The update is the product of the factors, not what rounding to the base's type leaves of it"
    base,a,want = make(tmp_path, 'llama', dtype=dtype, r=3, target_modules=['q_proj','down_proj'])
    rows = scan(a, base, progress=False).set_index('name')
    sd,found = load_file(a/'adapter_model.safetensors'),Checkpoint(a, base)
    for k in [k for k in rows.index if 'q_proj' in k or 'down_proj' in k]:
        A,B = (sd[f'base_model.model.{k[:-7]}.lora_{o}.weight'].double() for o in 'AB')
        D = B@A*(8/3)
        s = torch.linalg.svdvals(D-D.mean())
        assert rows.n_spikes[k]<=4 and not rows.fits[k]
        assert abs(rows.norm[k]/(D-D.mean()).norm().item()-1)<1e-9
        assert abs(rows.stable_rank[k]/(s.square().sum()/s[0]**2).item()-1)<1e-9
    assert (rows.norm[[k for k in rows.index if 'k_proj' in k]]==0).all()
    weights = scan(a, base, of='weights', progress=False).set_index('name')
    assert weights.norm.min()>0

def edited(folder, out, **config):
    "Copy of an adapter with another configuration"
    out.mkdir()
    for f in folder.iterdir():
        if f.is_file(): (out/f.name).write_bytes(f.read_bytes())
    told = json.loads((out/'adapter_config.json').read_text()) | config
    (out/'adapter_config.json').write_text(json.dumps(told))
    return out

@pytest.mark.parametrize('config,said', (
    (dict(peft_type='LOHA'), 'LOHA'), (dict(peft_type='IA3'), 'IA3'), (dict(peft_type='PROMPT_TUNING'), 'PROMPT_TUNING'),
    (dict(peft_type='ADALORA'), 'ADALORA'), (dict(peft_type='VERA'), 'VERA'), (dict(peft_type=None), 'None'),
    (dict(use_dora=True), 'use_dora'), (dict(init_lora_weights='pissa'), 'pissa'), (dict(init_lora_weights='pissa_niter_4'), 'pissa_niter_4'),
    (dict(init_lora_weights='olora'), 'olora'), (dict(init_lora_weights='loftq'), 'loftq'), (dict(init_lora_weights='corda'), 'corda'),
    (dict(target_parameters=['x']), 'target_parameters'), (dict(trainable_token_indices=[1]), 'trainable_token_indices'),
    (dict(layer_replication=[[0, 1]]), 'layer_replication'), (dict(use_qalora=True), 'use_qalora'),
    (dict(alora_invocation_tokens=[1]), 'alora_invocation_tokens'), (dict(something_new='x'), 'something_new'),
    (dict(r=5), 'rank'), (dict(rank_pattern={'query': 7}), 'rank'), (dict(rank_pattern={'(': 7}), 'pattern'), (dict(r='4'), 'no number'),
    (dict(lora_alpha=None), 'no number'), (dict(rank_pattern=[1]), 'no table')), ids=str)
def test_refused_by_name(config, said, adapter_pair, tmp_path):
    base,a,_ = adapter_pair
    with pytest.raises(ValueError, match=said.replace('(', r'\(')): Checkpoint(edited(a, tmp_path/'x', **config), base)

@pytest.fixture(scope='session')
def adapter_pair(tmp_path_factory):
    return make(tmp_path_factory.mktemp('pair'), 'bert', r=4, target_modules=['query','value'], task_type='SEQ_CLS')

def test_refused_pairs(adapter_pair, tmp_path, run):
    "No base, another base, an adapter as base, half an adapter, a folder with both, factors in memory, no configuration"
    base,a,_ = adapter_pair
    code,said = run('spectrum-merge', a, a, '--out', tmp_path/'o')
    assert code and 'adapter' in said and '--base' in said and not (tmp_path/'o').exists()
    code,said = run('spectrum-scan', a)
    assert code and '--base' in said
    with pytest.raises(ValueError, match='is an adapter'): Checkpoint(a, Checkpoint(a, base))
    _gpt().save_pretrained(tmp_path/'gpt')
    with pytest.raises(ValueError, match='does not fit its base'): Checkpoint(a, tmp_path/'gpt')
    wide = {k: torch.cat([v, v], 1) if v.dim()==2 else v for k,v in load_file(base/'model.safetensors').items()}
    with pytest.raises(ValueError, match='shape'): Checkpoint(a, wide)
    sd = load_file(a/'adapter_model.safetensors')
    with pytest.raises(ValueError, match='adapter'): Checkpoint(sd, base)
    with pytest.raises(ValueError, match='adapter'): Checkpoint(peft.PeftModel.from_pretrained(tf.BertForSequenceClassification.from_pretrained(base), a))
    x = edited(a, tmp_path/'half')
    save_file({k: v for k,v in sd.items() if not ('layer.0' in k and 'lora_B' in k)}, x/'adapter_model.safetensors')
    with pytest.raises(ValueError, match='has A and B'): Checkpoint(x, base)
    save_file(sd | {'base_model.model.bert.encoder.layer.0.attention.self.query.lora_magnitude_vector': torch.ones(32)}, x/'adapter_model.safetensors')
    with pytest.raises(ValueError, match='no part of a LoRA'): Checkpoint(x, base)
    save_file(sd | {k.replace('layer.0', 'layer.7'): v.clone() for k,v in sd.items() if 'layer.0' in k}, x/'adapter_model.safetensors')
    with pytest.raises(ValueError, match='layer.7'): Checkpoint(x, base)
    save_file(sd | {'base_model.model.bert.nowhere.weight': torch.ones(3)}, x/'adapter_model.safetensors')
    with pytest.raises(ValueError, match='nowhere'): Checkpoint(x, base)
    both = edited(a, tmp_path/'both')
    (both/'model.safetensors').write_bytes((base/'model.safetensors').read_bytes())
    with pytest.raises(ValueError, match='full model and an adapter'): Checkpoint(both, base)
    same(Checkpoint(both/'adapter_model.safetensors', base), adapter_pair[2])
    (both/'adapter_config.json').unlink()
    with pytest.raises(ValueError, match='adapter_config.json'): Checkpoint(both/'adapter_model.safetensors', base)
    nan = {k: v.clone() for k,v in sd.items()}
    next(v for k,v in nan.items() if 'lora_A' in k)[0, 0] = float('nan')
    x = edited(a, tmp_path/'nan')
    save_file(nan, x/'adapter_model.safetensors')
    ckpt = Checkpoint(x, base)
    with pytest.raises(ValueError, match='NaN'): [ckpt.read(k) for k in ckpt]

def test_pickled_and_other_prefixes(adapter_pair, tmp_path):
    "adapter_model.bin; a base without its prefix; factors in another type"
    base,a,want = adapter_pair
    sd,x = load_file(a/'adapter_model.safetensors'),edited(a, tmp_path/'bin')
    (x/'adapter_model.safetensors').unlink()
    torch.save(sd, x/'adapter_model.bin')
    same(Checkpoint(x, base), want)
    bare = {k.removeprefix('bert.'): v for k,v in load_file(base/'model.safetensors').items() if k.startswith('bert.')}
    found = Checkpoint(a, bare)
    # a head lies beside the body, which then needs the name that the class gives it
    assert set(found)=={'classifier.weight','classifier.bias', *(f'bert.{k}' for k in bare)}
    for k in found: assert torch.equal(found.read(k), want[k])
    half = edited(a, tmp_path/'half')
    save_file({k: v.bfloat16() for k,v in sd.items()}, half/'adapter_model.safetensors')
    again = peft.PeftModel.from_pretrained(tf.BertForSequenceClassification.from_pretrained(base), half).merge_and_unload().state_dict()
    same(Checkpoint(half, base), {k: v for k,v in again.items()})

def test_memory(tmp_path, commands):
    "Two adapters on a base larger than the limit: merged by blocks"
    W = {f'layers.{i}.q.weight': torch.randn(2048, 4096)*.02 for i in range(14)}
    save_file(W, tmp_path/'base.safetensors')
    for n in 'ab':
        (tmp_path/n).mkdir()
        save_file({f'base_model.model.{k[:-7]}.lora_{o}.weight': torch.randn(*((16, 4096) if o=='A' else (2048, 16)))
            for k in W for o in 'AB'}, tmp_path/n/'adapter_model.safetensors')
        (tmp_path/n/'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', r=16, lora_alpha=16)))
    code = '''import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True, capture_output=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)'''
    peak = int(subprocess.run([sys.executable, '-c', code, commands/'spectrum-merge', tmp_path/'a', tmp_path/'b', '--base',
        tmp_path/'base.safetensors', '--out', tmp_path/'o'], check=True, capture_output=True, text=True).stdout)
    assert peak < 350_000
    assert (tmp_path/'o'/'model.safetensors').stat().st_size > 350_000_000

class _Conv(nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.conv,self.line,self.norm = nn.Conv2d(16, 24, kernel),nn.Linear(24, 32),nn.LayerNorm(32)
        self.flat,self.more = nn.Conv1d(16, 20, kernel),nn.Linear(32, 32)

@pytest.mark.parametrize('kernel', (1, 3))
def test_convolutions(kernel, tmp_path):
    "Factors of four dimensions; a kernel of one is a matrix to the bit, larger ones to a rounding"
    torch.manual_seed(0)
    base = _Conv(kernel)
    save_file(base.state_dict(), tmp_path/'base.safetensors')
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=['conv','flat','line']))
    random_(model, 1)
    model.save_pretrained(tmp_path/'a')
    want = model.merge_and_unload().state_dict()
    found = Checkpoint(tmp_path/'a', tmp_path/'base.safetensors')
    for k in want: torch.testing.assert_close(found.read(k), want[k], rtol=1e-6, atol=1e-7)
    if kernel==1: assert torch.equal(found.read('conv.weight'), want['conv.weight'])

@pytest.mark.parametrize('cls', ['BertModel','BertForSequenceClassification'])
def test_adapters_for_tasks_on_a_base_without_head(cls, tmp_path):
    "Merged, they are classifiers with their own numbers of labels, whatever class the base was saved from; logits as PEFT's"
    from peft import LoraConfig, get_peft_model
    from spectrum_merging.merge import load_model
    c = tf.BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    torch.manual_seed(0)
    getattr(tf, cls)(c).save_pretrained(tmp_path/'base')
    ids,want = torch.arange(5, 13)[None],{}
    for i,(k,n) in enumerate(dict(mood=3, topic=5).items()):
        torch.manual_seed(i+1)
        m = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path/'base', num_labels=n, ignore_mismatched_sizes=True)
        get_peft_model(m, LoraConfig(task_type='SEQ_CLS', r=2, target_modules=['query','value'])).save_pretrained(tmp_path/k)
        want[k] = m
    paths = {k: tmp_path/k for k in want}
    out = merge(make_plan('standard', paths, tmp_path/'base'), paths, tmp_path/'base', out=tmp_path/'out')
    for k,m in want.items(): # the factors start at zero: bodies are the base
        got = load_model(out, k)
        assert got.config.num_labels==m.config.num_labels
        with torch.no_grad(): torch.testing.assert_close(got(ids).logits, m.eval()(ids).logits, atol=1e-5, rtol=1e-5)

def test_what_a_class_for_a_task_has(tmp_path, run):
    "A head for words is left out, said aloud; a pooler that was random when the adapter was trained is refused"
    from peft import LoraConfig, get_peft_model
    c = tf.BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    for cls in ('BertForPreTraining','BertForMaskedLM'):
        getattr(tf, cls)(c).save_pretrained(tmp_path/cls/'base')
        for k in 'ab':
            m = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path/cls/'base', num_labels=3)
            get_peft_model(m, LoraConfig(task_type='SEQ_CLS', r=2, target_modules=['query'])).save_pretrained(tmp_path/cls/k)
    base,a,b = (tmp_path/'BertForPreTraining'/k for k in ('base','a','b'))
    code,said = run('spectrum-merge', f'x={a}', f'y={b}', '--base', base, '--out', tmp_path/'o')
    assert not code and 'BertForSequenceClassification has no such' in said, said
    for folder in (tmp_path/'o', tmp_path/'o/heads/y'):
        _,info = tf.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(info[k] for k in ('missing_keys','unexpected_keys','mismatched_keys')), info
    base,a,b = (tmp_path/'BertForMaskedLM'/k for k in ('base','a','b'))
    code,said = run('spectrum-merge', a, b, '--base', base, '--out', tmp_path/'p')
    assert code==1 and 'bert.pooler.dense.weight' in said and 'modules_to_save' in said and not (tmp_path/'p').exists(), said
