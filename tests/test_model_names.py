"Every model gets the first one's names and constants; what is a weight is never dropped."
import json, os, pytest, re, shutil, subprocess, sys, torch, transformers as T, warnings
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from spectrum_merging.checkpoint import Checkpoint
from spectrum_merging.merge import merge
from spectrum_merging.formats import loaded_names
from spectrum_merging.names import align, constants
from spectrum_merging.plan import make_plan
from spectrum_merging.preflight import PreflightError, name_models, preflight
from spectrum_merging.scan import scan
from spectrum_merging.verify import verify

T.utils.logging.set_verbosity_error()
T.utils.logging.disable_progress_bar()

def R(*s, seed=0): return torch.randn(s, generator=torch.Generator().manual_seed(seed))

S = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
V = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8)
made = {
    'bert': lambda: T.BertForSequenceClassification(T.BertConfig(**S, max_position_embeddings=40)),
    'roberta': lambda: T.RobertaForMaskedLM(T.RobertaConfig(**S, max_position_embeddings=40)),
    'gpt2': lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64)),
    'gptneox': lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**S, max_position_embeddings=40)),
    'llama': lambda: T.LlamaForCausalLM(T.LlamaConfig(**S, num_key_value_heads=2)),
    't5': lambda: T.T5ForConditionalGeneration(T.T5Config(vocab_size=96, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8)),
    'vit': lambda: T.ViTForImageClassification(T.ViTConfig(**V)), 'dinov2': lambda: T.Dinov2Model(T.Dinov2Config(**V)),
    'swin': lambda: T.SwinForImageClassification(T.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2)),
    'clip': lambda: T.CLIPModel(T.CLIPConfig(text_config=S | dict(max_position_embeddings=16), vision_config=V, projection_dim=16)),
    'llava': lambda: T.LlavaForConditionalGeneration(T.LlavaConfig(text_config=T.LlamaConfig(**S), vision_config=T.CLIPVisionConfig(**V, projection_dim=32))),
    'wav2vec2': lambda: T.Wav2Vec2Model(T.Wav2Vec2Config(**{k: v for k,v in S.items()}, conv_dim=(32, 32), conv_stride=(2, 2), conv_kernel=(3, 3),
        num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4))}

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "`(folder, module, state dict of the file)` by kind, made once"
    found = {}
    def get(kind):
        if kind not in found:
            torch.manual_seed(len(found))
            d,m = tmp_path_factory.mktemp(kind),made[kind]()
            m.save_pretrained(d)
            found[kind] = d,m,load_file(d/'model.safetensors')
        return found[kind]
    return get

def put(d, sd, like=None):
    d.mkdir(exist_ok=True, parents=True)
    save_file({k: v.clone().contiguous() for k,v in sd.items()}, d/'model.safetensors', metadata=dict(format='pt'))
    if like: shutil.copy(like/'config.json', d)
    return d

@pytest.mark.parametrize('kind', made)
def test_module_beside_its_file(kind, saved):
    "What transformers saves under other names than a module has is the same model, either way round"
    d,m,sd = saved(kind)
    for a,b in ((d, m), (m, d)):
        models,_ = name_models([a, b])
        x,y = models['a'],models['b']
        shared = [k for k in x if k in y]
        assert all(x.read(k).equal(y.read(k)) for k in shared)
        ties = {**x.aliases, **y.aliases}
        assert all(k in shared or k in ties or ties.get(k) in shared for k in {*x, *y}), set(x)^set(y)

def older(sd, kind):
    "The names of years ago"
    new = {re.sub(r'LayerNorm\.weight$', 'LayerNorm.gamma', re.sub(r'LayerNorm\.bias$', 'LayerNorm.beta', k)): v for k,v in sd.items()}
    new = {k.replace('parametrizations.weight.original0', 'weight_g').replace('parametrizations.weight.original1', 'weight_v'): v for k,v in new.items()}
    if kind=='llava': new = {re.sub('^model\\.language_model', 'language_model.model', re.sub('^lm_head', 'language_model.lm_head',
        re.sub(r'^model\.(vision_tower|multi_modal)', r'\1', k))): v for k,v in new.items()}
    return new

@pytest.mark.parametrize('kind', ['bert','roberta','wav2vec2','llava'])
def test_old_names(kind, saved, tmp_path):
    "The merge of a file of today with one of years ago is that of two of today, has the first one's names, loads and verifies"
    d,m,sd = saved(kind)
    other = {k: v+.01*R(*v.shape) if v.is_floating_point() else v for k,v in sd.items()}
    today = put(tmp_path/'today', other, d)
    before = put(tmp_path/'before', older(m.state_dict() if kind=='llava' else other, kind), d)
    if kind=='llava': before = put(tmp_path/'before', {k: other[k] if k in other else v for k,v in older(m.state_dict(), kind).items()}, d)
    changed = set(load_file(before/'model.safetensors'))!=set(other)
    for i,(a,b) in enumerate(((d, today), (d, before))):
        merge(make_plan('standard', [a, b], heads=[]), [a, b], out=tmp_path/f'o{i}')
    x,y = (load_file(tmp_path/f'o{i}'/'model.safetensors') for i in range(2))
    assert changed or kind=='llava'
    assert set(x)==set(y)==set(sd) and all(x[k].equal(y[k]) for k in x)
    assert verify(tmp_path/'o1').ok.all()
    _,info = type(m).from_pretrained(tmp_path/'o1', output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']

def test_old_base(saved, tmp_path):
    "A base with gamma and beta, without its task's head, gives the merge of one with weight and bias, and measures the same"
    d,m,sd = saved('bert')
    base = {k: v-.01*R(*v.shape) for k,v in sd.items() if 'classifier' not in k}
    new,old = put(tmp_path/'new', base, d),put(tmp_path/'old', older(base, 'bert') | {'bert.embeddings.position_ids': torch.arange(40)[None]}, d)
    res = [merge(make_plan('task_arithmetic', [d, d], o), [d, d], o) for o in (new, old)]
    assert res[0].keys()==res[1].keys() and all(res[0][k].equal(res[1][k]) for k in res[0])
    a,b = (scan(d, o, progress=False) for o in (new, old))
    assert a.equals(b) and any('LayerNorm.beta' in o for o in b.attrs['notes']) and not a.attrs['notes']

def test_stacked_experts_beside_single_ones(tmp_path):
    "Experts one by one, and the same in one tensor: refused by name, whichever comes first"
    m = T.MixtralForCausalLM(T.MixtralConfig(**S, num_key_value_heads=2, num_local_experts=4))
    m.save_pretrained(tmp_path/'m')
    for a in ([tmp_path/'m', m], [m, tmp_path/'m']):
        with pytest.raises(ValueError, match='gate_up_proj.*save_pretrained'): name_models(a)

def test_no_transformers_where_names_agree(saved, tmp_path):
    d,m,sd = saved('bert')
    old = put(tmp_path/'old', sd | {'bert.embeddings.position_ids': torch.arange(40)[None]}, d)
    code = f'''import sys
from spectrum_merging.preflight import name_models
name_models([{str(d)!r}, {str(old)!r}])
assert 'transformers' not in sys.modules and 'torch' not in sys.modules'''
    assert subprocess.run([sys.executable, '-c', code]).returncode==0

def test_names_never_collide():
    assert loaded_names(['a.LayerNorm.gamma','a.LayerNorm.weight'], {})=={k: k for k in ('a.LayerNorm.gamma','a.LayerNorm.weight')}
    assert loaded_names(['x'], dict(model_type='nothing', architectures=['os']))=={'x': 'x'}
    assert loaded_names(['x'], dict(model_type=['odd'], architectures=[3]))=={'x': 'x'}

# --- constants

n = 8
tril = torch.ones(n, n).tril()
inf = torch.full((n, n), float('-inf')).triu(1)
angle = torch.arange(n)[:, None]/100**(torch.arange(4.)/4)
good = {'e.position_ids': torch.arange(n)[None], 'r.position_ids': torch.arange(2, n+2), 'h.position_ids': torch.arange(n).half()[None], 'e.token_type_ids': torch.zeros(1, n).long(),
    'l.0.rotary_emb.inv_freq': 1/1e4**(torch.arange(0, 8, 2)/8), 'x.rotary_emb.cos_cached': angle.cos(), 'h.0.attn.bias': tril[None, None], 'h.1.attn.bias': tril.bool()[None, None],
    'g.attention.bias': tril.to(torch.uint8)[None, None], 'h.0.attn.masked_bias': torch.tensor(-1e4), 'g.attention.masked_bias': torch.tensor(-1e9),
    'enc.embed_positions.weight': torch.cat([angle.sin(), angle.cos()], 1), 'enc.embed_positions.weights': torch.stack([angle.sin(), angle.cos()], 2).flatten(1), 'pos_encoder.pe': torch.cat([angle.sin(), angle.cos()], 1)[None],
    'w.relative_position_index': torch.arange(9).reshape(3, 3), 'attn.mask': inf, 'a.causal_mask': tril, 'any.name': inf, 'w.attn_mask': torch.zeros(n, n).masked_fill(tril==0, -100.),
    'bn.num_batches_tracked': torch.tensor(3), 'betas': torch.linspace(.1, .2, n), 'alphas_cumprod': torch.linspace(.9, .1, n)}
weights = {'learned.position_ids': R(n), 'enc.embed_positions.weight': R(n, n), 'h.0.attn.bias': R(n), 'c.attention.bias': R(1, 1, n, n), 'x.mask': R(n, n), 'mask_token': R(1, 1, n), 'q.weight': R(n, n),
    'tri.weight': R(n, n).tril(), 'e.inv_freq': R(4), 'b.betas': R(n, n), 'l.gamma': torch.ones(n), 'one.weight': torch.ones(n, n), 'zero.weight': torch.zeros(n, n), 'nan.weight': torch.full((n, n), float('nan'))}

@pytest.mark.parametrize('k', good)
def test_constant(k): assert list(constants(Checkpoint({k: good[k], 'w': R(3)})))==[k]

@pytest.mark.parametrize('k', weights)
def test_weight(k): assert constants(Checkpoint({k: weights[k]}))=={}

@pytest.mark.parametrize('k', good)
def test_constant_in_one_model_only(k, tmp_path):
    "Kept where the first has it, dropped where not, and said; base and all, to the last byte, and provable"
    t = good[k]
    sd = [{'q.weight': R(n, n, seed=i), 'z.weight': R(n, n, seed=9+i)} for i in range(3)]
    a,b,base = (put(tmp_path/o, s) for o,s in zip(('a','b','base'), sd))
    full = [put(tmp_path/f'f{i}', s | {k: t}) for i,s in enumerate(sd)]
    for i,(models,base_,has) in enumerate((([full[0], b], base, True), ([a, full[1]], full[2], False), ([full[0], full[1]], base, True))):
        models,o = [*models],tmp_path/f'o{i}'
        plan = make_plan('task_arithmetic', models, base_, scale=.5)
        merge(plan, models, base_, out=o)
        res = load_file(o/'model.safetensors')
        assert set(res)=={*sd[0], *([k] if has else [])}
        assert torch.allclose(res['q.weight'], sd[2]['q.weight']+.5*(sd[0]['q.weight']+sd[1]['q.weight']-2*sd[2]['q.weight']), atol=1e-6)
        if has: assert res[k].dtype==t.dtype and res[k].equal(t)
        assert verify(o, all=True).ok.all()
        opened,base_ = name_models(models, base_)
        assert any(k in x for c in (*opened.values(), base_) for x in c.notes)

@pytest.mark.parametrize('k', list(weights)[:-1])
def test_weight_in_one_model_only(k):
    "A parameter that a model lacks is refused, whatever it is called"
    sd = [{'q.weight': R(n, n, seed=i)} for i in range(2)]
    for a in ([sd[0] | {k: weights[k]}, sd[1]], [sd[0], sd[1] | {k: weights[k]}]):
        if k=='q.weight': a = [{k: weights[k], 'v.weight': R(3, 3)}, {'v.weight': R(3, 3)}]
        with pytest.raises(PreflightError, match=re.escape(k)): make_plan('standard', a, heads=[])

@settings(deadline=None, max_examples=30)
@given(size=st.integers(2, 300), first=st.sampled_from(['int64','int32','float32','float16','bfloat16']), second=st.sampled_from(['int64','int32','float32','float16','bfloat16']))
def test_positions_of_any_type(size, first, second):
    "Equal positions follow the first model's type; `bfloat16` cannot count beyond 256"
    t = torch.arange(size)[None]
    if 'bfloat16' in (first, second): t = t[:, :256]
    sd = [{'x.position_ids': t.to(getattr(torch, o)), 'q.weight': R(4, 4, seed=i)} for i,o in enumerate((first, second))]
    res = merge(make_plan('standard', sd), sd)
    assert res['x.position_ids'].equal(sd[0]['x.position_ids']) and torch.allclose(res['q.weight'], (sd[0]['q.weight']+sd[1]['q.weight'])/2)

@pytest.mark.parametrize('k,a,b', [('r.inv_freq', 1/1e4**(torch.arange(4.)/4), 1/5e5**(torch.arange(4.)/4)), ('x.position_ids', torch.arange(8), torch.arange(2, 10)),
    ('w.relative_position_index', torch.arange(4), torch.arange(1, 5)), ('attn.mask', inf, torch.full((n, n), float('-inf')).tril(-1)), ('betas', torch.linspace(.1, .2, 9), torch.linspace(.1, .3, 9))])
def test_constants_that_differ(k, a, b):
    with pytest.raises(ValueError, match=re.escape(k)+'.*differs between a .* and b.*compute differently'): name_models([{k: a, 'w': R(2)}, {k: b, 'w': R(2)}])

@pytest.mark.parametrize('k,a,b', [('r.inv_freq', 1/1e4**(torch.arange(4.)/4), (1/1e4**(torch.arange(4.)/4)).bfloat16()), ('h.masked_bias', torch.tensor(-1e4), torch.tensor(-1e9)),
    ('x.position_ids', torch.arange(8)[None], torch.arange(12)[None]), ('h.attn.bias', tril[None, None], tril.bool()[None, None]), ('h.attn.bias', tril[None, None].bool(), tril[None, None].to(torch.uint8))])
def test_constants_that_are_the_same_to_the_model(k, a, b):
    sd = [{k: t, 'w': R(2, 2, seed=i)} for i,t in enumerate((a, b))]
    models,_ = name_models(sd)
    assert any(k in o for o in models['b'].notes)
    res = merge(make_plan('standard', sd), sd)
    assert res[k].equal(a) and res[k].dtype==a.dtype

@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
@pytest.mark.parametrize('strategy', ['standard','task_arithmetic','tsv_m','snr_winner'])
def test_masks(strategy, dtype):
    "The same in all models: kept as it is by every strategy, and no scan measures it"
    base,*sd = [{'attn.weight': R(32, 32, seed=i), 'attn.mask': inf, 'other': inf.T.clone()} for i in range(3)]
    b = base if strategy!='standard' else None
    res = merge(make_plan(strategy, sd, b), sd, b, dtype=dtype)
    assert res['attn.mask'].equal(inf) and res['attn.mask'].dtype==torch.float32 and res['other'].equal(inf.T)
    assert scan(sd[0], progress=False).name.tolist()==scan(sd[0], base, progress=False).name.tolist()==['attn.weight']

def test_a_weight_with_infinities_is_no_mask():
    w = R(8, 8)
    w[0, 0] = float('inf')
    with pytest.raises(ValueError, match='Inf'): scan({'w': w}, progress=False)
    with pytest.raises(ValueError, match='1 Inf'): merge(make_plan('standard', [{'w': w}]*2), [{'w': w}]*2)

# --- other architectures and true remedies

@pytest.mark.parametrize('other', ['gpt2','llama','t5','vit'])
def test_other_architectures(other, saved):
    with pytest.raises(PreflightError) as e: make_plan('standard', [saved('bert')[0], saved(other)[0]])
    kind = json.loads((saved(other)[0]/'config.json').read_text())['model_type']
    assert 'bert' in str(e.value) and kind in str(e.value) and 'different architectures' in str(e.value) and len(e.value.table)<4

def test_other_architectures_without_configuration(saved):
    with pytest.raises(PreflightError, match='share 0 of .* different architectures') as e: make_plan('standard', [saved('bert')[2], saved('gpt2')[2]])
    assert len(e.value.table)==1

@pytest.mark.parametrize('prefix,word', [('module.','DataParallel'),('_orig_mod.','torch.compile'),('bert.','same class')])
def test_prefixes(prefix, word, saved):
    sd = saved('bert')[2]
    other = {k.removeprefix(prefix) for k in sd}
    b = {k.removeprefix('bert.'): v for k,v in sd.items()} if prefix=='bert.' else {prefix+k: v for k,v in sd.items()}
    with pytest.raises(PreflightError) as e: make_plan('standard', [sd, b], heads=[])
    assert f"prefix '{prefix}'" in str(e.value) and word in str(e.value)

@pytest.mark.parametrize('k', ['embeddings.position_embeddings.weight','transformer.wpe.weight','model.decoder.embed_positions.weight','vit.embeddings.position_embeddings','visual.positional_embedding','pos_embed'])
def test_position_tables(k):
    "No advice about vocabularies"
    sd = [{k: R(i, 4), 'q.weight': R(4, 4)} for i in (8, 12)]
    with pytest.raises(PreflightError) as e: make_plan('standard', sd, heads=[])
    assert 'max_position_embeddings' in str(e.value) and 'vocabular' not in str(e.value)

def test_vocabularies():
    sd = [{'wte.weight': R(i, 4), 'q.weight': R(4, 4)} for i in (8, 12)]
    with pytest.raises(PreflightError, match='resize_token_embeddings'): make_plan('standard', sd, heads=[])

def test_weight_norm_is_said(tmp_path):
    "What a layer multiplies with is in neither tensor: said, unlike a projection that is called to_v"
    x = dict(w=torch.randn(8, 4, 3), g=torch.ones(1, 1, 3), p=torch.randn(6, 6))
    save_file({'conv.weight_v': x['w'], 'conv.weight_g': x['g'], 'attn.to_v': x['p']}, tmp_path/'normed.safetensors')
    save_file({'attn.to_v': x['p'], 'attn.to_q': x['p']+1}, tmp_path/'plain.safetensors')
    def said(k): return [o for o in make_plan('standard', {m: tmp_path/f'{k}.safetensors' for m in 'ab'}).meta['notes'] if 'weight norm' in o]
    assert [o.partition(':')[0] for o in said('normed')]==['conv'] and not said('plain')
