"Every matrix is what a layer multiplies with, by names and shapes, in scans, plans and merges."
import copy, json, numpy as np, pytest, torch, transformers as tf, warnings
from functools import lru_cache
from safetensors.torch import load_file, save_file
from spectrum_merging.activations import input_grams
from spectrum_merging import align
from spectrum_merging.checkpoint import Checkpoint, TensorInfo
from spectrum_merging.edges import snr
from spectrum_merging.match import match_layers
from spectrum_merging.matrices import doubtful, flat_layout, layouts, module_layouts, owner_of
from spectrum_merging.merge import merge
from spectrum_merging.operations import run_operation
from spectrum_merging.plan import make_plan
from spectrum_merging.preflight import PreflightError
from spectrum_merging.repair import repair_channels
from spectrum_merging.rules import recipe, rule, rule_names, rules
from spectrum_merging.scan import scan
from spectrum_merging.stream import pieces, plan_rows
from spectrum_merging.units import find_units
from spectrum_merging.verify import verify
from torch import nn
from transformers.pytorch_utils import Conv1D

def infos(m): return {k: TensorInfo(tuple(v.shape), v.dtype) for k,v in m.state_dict().items()}
def info(*shape): return TensorInfo(shape, 'float32')
def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

# Encoders, decoders, encoder–decoders, mixtures, vision, speech, vision–language; sizes of the real models, two layers.
names = '''bert deberta-v2 distilbert electra roberta convbert funnel albert xlnet
    gpt2 openai-gpt imagegpt decision_transformer gpt_bigcode gpt_neo gpt_neox llama qwen3 mamba falcon_mamba recurrent_gemma
    t5 bart switch_transformers nllb-moe
    mixtral qwen3_moe deepseek_v3 gpt_oss olmoe aria_text granitemoe phimoe jamba
    vit convnext resnet swin sam segformer depth_pro got_ocr2 mask2former
    wav2vec2 hubert whisper encodec mimi dac vits univnet speecht5
    clip clipseg blip siglip qwen2_vl idefics clvp'''.split()

@lru_cache
def build(name):
    config = tf.CONFIG_MAPPING[name]()
    def lessen(c, k, f):
        try: setattr(c, k, f(getattr(c, k)))
        except (AttributeError, NotImplementedError, TypeError): pass # it has no such number, or derives it
    for c in [config, *(getattr(config, o, None) for o in ('text_config','vision_config','encoder_config','decoder_config'))]:
        for k in ('num_hidden_layers','n_layer','num_layers','encoder_layers','decoder_layers'): lessen(c, k, lambda n: min(n, 3))
        for k in ('layer_types','mlp_layer_types'): lessen(c, k, lambda o: o[:3])
    cls = tf.MODEL_MAPPING[type(config)]
    with torch.device('meta'): return (cls[0] if isinstance(cls, tuple) else cls)(config)

@pytest.mark.parametrize('name', names)
def test_names_and_shapes_say_what_classes_say(name):
    net = build(name)
    found,classes = layouts(infos(net)),module_layouts(net)
    seen = {k: o for k,o in classes.items() if o.is_matrix or found[k].is_matrix}
    assert len(seen)>3 and (name=='depth_pro' or not doubtful({k: found[k] for k in seen}))
    def key(o): return o.kind,o.block,o.count,o.flipped
    assert {k: key(found[k]) for k in seen}=={k: key(o) for k,o in seen.items()}
    shuffled = dict(sorted(infos(net).items(), key=lambda kv: kv[0][::-1]))
    assert {k: key(o) for k,o in layouts(shuffled).items()}=={k: key(o) for k,o in found.items()}

def test_names_cover_all_kinds():
    kinds = {o.kind for n in names for o in module_layouts(build(n)).values()}
    assert len(names)>25 and kinds=={'linear','transposed','conv','transposed conv','stacked'}

mlp = 'model.layers.0.mlp'
@pytest.mark.parametrize('flipped,shapes', [
    # sizes 32 and 64, as in tests of libraries; square layers and ones as wide as the hidden state
    (True, {f'{mlp}.experts.gate_up_proj': (4, 32, 128), f'{mlp}.experts.down_proj': (4, 64, 32)}), # Llama 4
    (True, {f'{mlp}.experts.gate_up_proj': (4, 32, 64), f'{mlp}.experts.down_proj': (4, 32, 32)}),
    (True, {f'{mlp}.experts.gate_up_proj': (4, 32, 32), f'{mlp}.experts.down_proj': (4, 16, 32)}),
    (False, {f'{mlp}.experts.gate_up_proj': (4, 128, 32), f'{mlp}.experts.down_proj': (4, 32, 64)}), # Mixtral
    (False, {f'{mlp}.experts.gate_up_proj': (4, 64, 32), f'{mlp}.experts.down_proj': (4, 32, 32)}),
    (False, {f'{mlp}.input_linear.weight': (4, 128, 32), f'{mlp}.output_linear.weight': (4, 32, 64)}), # JetMoE
    (True, {f'{mlp}.experts.fc1.weight': (4, 32, 128), f'{mlp}.experts.fc2.weight': (4, 64, 32)}), # Aria
    (False, {f'{mlp}.experts.up_proj': (4, 24, 32), f'{mlp}.experts.down_proj': (4, 32, 24), f'{mlp}.gate.weight': (4, 32)}),
    (True, {f'{mlp}.experts.up_proj': (4, 32, 24), f'{mlp}.experts.down_proj': (4, 24, 32), f'{mlp}.gate.weight': (4, 32)}),
    (True, {f'{mlp}.experts.gate_up_proj': (4, 32, 64), f'{mlp}.experts.gate_up_proj_bias': (4, 64)}), # gpt-oss
    (False, {f'{mlp}.experts.up_proj': (4, 64, 32), f'{mlp}.experts.up_proj_bias': (4, 64)}),
    (True, {'rg_lru.input_gate_weight': (4, 8, 8), 'rg_lru.recurrent_gate_weight': (4, 8, 8)}), # RecurrentGemma
    (True, {'codebooks_head.weight': (31, 32, 96)}), # CSM
    (True, {'layer.0.intermediate.dense.weight': (2, 16, 32), 'layer.0.intermediate.dense.bias': (64,)}), # ConvBERT
    (False, {'decoder.layers.0.self_attn.q_proj.linear.weight': (8, 32, 32)})]) # Moshi
def test_stacks(flipped, shapes):
    found = layouts({k: info(*s) for k,s in shapes.items()})
    stacks = {k: found[k] for k,s in shapes.items() if len(s)==3}
    assert {o.kind for o in stacks.values()}=={'stacked'} and {o.flipped for o in stacks.values()}=={flipped}
    assert all(o.count==o.shape[0] for o in stacks.values()) and not doubtful(found) or 'linear' in str(shapes)
    assert all(o.kind=='none' and o.block==(1, o.shape[1]) for k,o in found.items() if k.endswith('proj_bias'))

def test_dbrx():
    at = 'transformer.blocks.0.ffn'
    found = layouts({**{f'{at}.experts.mlp.{o}': info(4*48, 32) for o in ('w1','v1','w2')},
        f'{at}.router.layer.weight': info(4, 32)})
    assert {k[-2:]: (o.count, o.matrix) for k,o in found.items() if 'mlp' in k}=={
        'w1': (4, (48, 32)), 'v1': (4, (48, 32)), 'w2': (4, (32, 48))}

def linear(n, m, **k): return dict(weight=info(n, m), **k)
@pytest.mark.parametrize('kind,net', [
    ('linear', {'c_attn.weight': info(96, 32), 'c_attn.bias': info(96), 'c_proj.weight': info(32, 32), 'c_proj.bias': info(32)}),
    ('transposed', {'c_attn.weight': info(32, 96), 'c_attn.bias': info(96), 'c_proj.weight': info(32, 32), 'c_proj.bias': info(32)}),
    ('transposed', {'h.0.attn.c_attn.weight': info(32, 96), 'h.0.attn.c_attn.bias': info(96), # as wide as the hidden state
        'h.0.mlp.c_fc.weight': info(32, 32), 'h.0.mlp.c_fc.bias': info(32),
        'h.0.mlp.c_proj.weight': info(32, 32), 'h.0.mlp.c_proj.bias': info(32)}),
    ('linear', {'lstm.weight_ih_l0': info(64, 8), 'lstm.bias_ih_l0': info(64), 'lstm.weight_hh_l0': info(64, 16)}),
    ('linear', {'a.in_proj_weight': info(96, 32), 'a.in_proj_bias': info(96)}),
    ('conv', {'a.weight': info(16, 8, 3), 'a.bias': info(16)}), ('conv', {'a.weight': info(16, 2, 3), 'a.bias': info(16)}),
    ('conv', {'conv.weight': info(16, 16, 4)}), ('conv', {'sr.weight': info(16, 16, 8, 8), 'sr.bias': info(16)}), ('conv', {'a.weight': info(16, 1, 3, 3)}), ('conv', {'patch.weight': info(32, 3, 16, 16)}),
    ('transposed conv', {'a.weight': info(8, 16, 3), 'a.bias': info(16)}),
    ('transposed conv', {'a.weight': info(8, 4, 3, 3, 3), 'a.bias': info(8*2)}),
    ('transposed conv', {'0.weight': info(64, 32, 4, 4), '1.weight': info(32), '1.bias': info(32), '1.running_mean': info(32)}),
    ('transposed conv', {'deconv.weight': info(16, 16, 3, 3), 'deconv.bias': info(16)}),
    ('transposed conv', {'conv_transpose1.weight': info(16, 8, 3)}), ('transposed conv', {'upsample.weight': info(16, 8, 4)}),
    ('transposed conv', {'a.weight_v': info(8, 16, 3), 'a.weight_g': info(8, 1, 1), 'a.bias': info(16)}),
    ('conv', {'a.parametrizations.weight.original1': info(16, 4, 128), 'a.parametrizations.weight.original0': info(1, 1, 128), 'a.bias': info(16)})])
def test_rules(kind, net):
    assert {o.kind for o in layouts(net).values() if o.is_matrix}=={kind}

def test_groups():
    found = layouts({'a.weight': info(8, 4, 3, 3), 'a.bias': info(12)})['a.weight']
    assert found.count==3 or found.kind=='conv' and not found.sure # 8 channels are no 3 groups
    found = layouts({'a.weight': info(6, 4, 3, 3), 'a.bias': info(12)})['a.weight']
    assert (found.count, found.matrix)==(3, (4, 18))

def test_square_kernels_of_even_size_are_in_doubt():
    net = {f'{k}.{o}': info(*s) for k in ('neck.layers.0.resize','head.layers.1') for o,s in dict(weight=(96, 96, 4, 4), bias=(96,)).items()}
    found = [o for o in layouts(net).values() if o.is_matrix]
    assert [(o.kind, o.sure) for o in found]==[('transposed conv', False), ('conv', False)] # as in DPT and Depth Pro

def test_guesses_are_said():
    net = {'up.0.weight': info(64, 64, 4, 4), 'experts.w': info(4, 8, 16)}
    assert doubtful(layouts(net)).endswith('and 1 more') and not doubtful({})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        models = [{k: randn(*o.shape, seed=i) for k,o in net.items()} for i in range(3)]
        merge(make_plan('tsv_m', models[:2], models[2]), models[:2], models[2])
    assert any('guessed how' in str(o.message) for o in said)
    table = scan(models[0], progress=False).set_index('name')
    assert table.layout.to_dict()=={'up.0.weight': 'transposed conv?', 'experts.w': 'stacked?'}

every = {'linear': (6, 10), 'transposed': (6, 10), 'square': (8, 8), 'conv': (6, 4, 3, 3), 'turned': (6, 4, 3), 'groups': (6, 2, 2, 2),
    'wide': (3, 6, 10), 'tall': (3, 10, 6), 'cubes': (5, 8, 8)}
def one_of(what):
    shape,flip = every[what],what in ('transposed','square','tall','cubes')
    if what in ('turned','groups'):
        g = 3 if what=='groups' else 1
        return layouts({'a.weight': info(*shape), 'a.bias': info(g*shape[1])})['a.weight']
    if len(shape)==3: return layouts({'experts.w': info(*shape), 'experts.w_bias': info(shape[0], shape[2 if flip else 1])})['experts.w']
    if what=='square': return layouts({'a.weight': info(8, 8), 'a.bias': info(8), 'b.weight': info(8, 9), 'b.bias': info(9)})['a.weight']
    return layouts({'a.weight': info(*shape), 'a.bias': info(shape[1 if flip else 0])})['a.weight']

@pytest.mark.parametrize('what', every)
def test_views_and_back(what):
    o,W = one_of(what),randn(*every[what])
    for x in (W, W.numpy()):
        parts = o.split(x)
        assert len(parts)==o.count and {tuple(p.shape) for p in parts}=={o.matrix}
        if len(o.block)==2: assert all(np.shares_memory(np.asarray(p), np.asarray(x)) for p in parts)
        back = np.concatenate([np.asarray(o.flat(p)) for p in parts]).reshape(W.shape)
        assert (back==W.numpy()).all()

def test_layers_multiply_with_their_matrices():
    x = randn(5, 12)
    m = Conv1D(20, 12)
    assert torch.allclose(x@layouts(infos(m))['weight'].one(m.weight.detach()).T, m(x)-m.bias, atol=1e-6)
    # a transposed convolution of stride 1 is the convolution with swapped channels and a reversed kernel
    m,z = nn.ConvTranspose1d(6, 4, 3, groups=2),randn(2, 6, 7)
    parts = [o.reshape(2, 3, 3).flip(2) for o in layouts(infos(m))['weight'].split(m.weight.detach())]
    assert torch.allclose(nn.functional.conv1d(z, torch.cat(parts), m.bias, padding=2, groups=2), m(z), atol=1e-5)

ops = ['tsv_m','ridge_mean','shrink_mean','iso_c','iso_cts','ties','dare(density=0.5)','slerp','tsv_m(rank=edge)']

def tuned(base, seed):
    g = torch.Generator().manual_seed(seed)
    def spike(v): return torch.outer(torch.randn(v.shape[0], generator=g), torch.randn(v[0].numel(), generator=g)).reshape(v.shape)
    return {k: v+.01*torch.randn(v.shape, generator=g)+(.03*spike(v) if v.dim()>1 else 0) for k,v in base.items()}
def plan_of(op, models, base): return make_plan(op, models, None if op=='slerp' else base)

def merged(op, models, base):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return merge(plan_of(op, models, base), models, None if op=='slerp' else base)

@pytest.mark.parametrize('op', ops)
@pytest.mark.parametrize('flip', [False, True])
def test_stacked_experts_are_merged_one_by_one(op, flip):
    E,n,m = 4,24,40
    shapes = {'experts.up_proj': (E, m, n), 'experts.up_proj_bias': (E, n)} if flip else {
        'experts.up_proj': (E, n, m), 'experts.up_proj_bias': (E, n)}
    base = {k: randn(*s) for k,s in shapes.items()}
    x,y = tuned(base, 1),tuned(base, 2)
    def apart(s): return {f'{e}.{dict(up_proj="weight", up_proj_bias="bias")[k[8:]]}':
        (v[e].T if flip and v.dim()==3 else v[e]).clone() for k,v in s.items() for e in range(E)}
    got = apart(merged(op, dict(x=x, y=y), base))
    want = merged(op, dict(x=apart(x), y=apart(y)), apart(base))
    for k in want: torch.testing.assert_close(got[k], want[k], atol=1e-6, rtol=1e-6)

@pytest.mark.parametrize('op', ops)
def test_transposed_layers_are_merged_as_linear_ones(op):
    base = {'a.weight': randn(24, 40), 'a.bias': randn(40), 'b.weight': randn(40, 40), 'b.bias': randn(40),
        'up.weight': randn(12, 8, 4), 'up.bias': randn(8)}
    x,y = tuned(base, 1),tuned(base, 2)
    def turned(s): return {k: v.swapaxes(0, 1).contiguous() if v.dim()>1 else v for k,v in s.items()}
    got,want = turned(merged(op, dict(x=x, y=y), base)),merged(op, dict(x=turned(x), y=turned(y)), turned(base))
    for k in want: torch.testing.assert_close(got[k], want[k], atol=1e-6, rtol=1e-6)

def zoo(dtype=torch.float32):
    net = {'model.embed_tokens.weight': (50, 12), 'a.weight': (12, 30), 'a.bias': (30,), 'b.weight': (9, 7), 'sq.weight': (30, 30), 'sq.bias': (30,),
        'c.weight': (9, 4, 3, 3), 'c.bias': (9,), 't.weight': (12, 4, 3), 't.bias': (8,), 't2.weight': (6, 16, 2), 't2.bias': (16,),
        'mlp.experts.gate_up_proj': (3, 12, 20), 'mlp.experts.gate_up_proj_bias': (3, 20), 'mlp.experts.down_proj': (3, 10, 12),
        'mlp.experts.down_proj_bias': (3, 12), 'odd_experts.w': (5, 3, 5)}
    return {k: randn(*s, seed=i).to(dtype) for i,(k,s) in enumerate(net.items())}

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_files_and_memory_give_the_same(tmp_path, dtype):
    base = zoo()
    models = {m: {k: v.to(dtype) for k,v in tuned(base, i).items()} for i,m in enumerate(('base','x','y'))}
    for m,sd in models.items():
        (tmp_path/m).mkdir()
        save_file({k: v.contiguous() for k,v in sd.items()}, tmp_path/m/'model.safetensors')
    held,filed = models['x'],tmp_path/'x'
    for estimator in ('flip','mp','spectrum','paper_vision'):
        a,b = (scan(*o, estimator=estimator, progress=False) for o in ((held, models['base']), (filed, tmp_path/'base')))
        a,b = (o.sort_values('name', ignore_index=True) for o in (a, b))
        assert a.name.tolist()==b.name.tolist()
        for k in a.columns.drop(['shape']):
            if a[k].dtype.kind=='f': np.testing.assert_allclose(a[k], b[k], rtol=1e-5, atol=1e-6)
            else: assert a[k].tolist()==b[k].tolist()
    for op in ('tsv_m','ridge_mean','ties'):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            there = [tmp_path/'x',tmp_path/'y']
            plan = make_plan(op, there, tmp_path/'base')
            out = merge(plan, there, tmp_path/'base', out=tmp_path/op)
            memory = merged(op, dict(x=models['x'], y=models['y']), models['base'])
            assert verify(out).ok.all()
        written = load_file(out/'model.safetensors')
        for k,v in memory.items(): assert v.equal(written[k]), k

def test_a_piece_is_a_matrix():
    models = [tuned(zoo(), i) for i in range(3)]
    plan = make_plan('tsv_m', models[:2], models[2])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        rows = plan_rows(plan, dict(zip(plan.models, map(Checkpoint, models))), Checkpoint(models[2]))
    count = {r.name: sum(p.row is r for p in pieces(rows)) for r in rows}
    assert count['mlp.experts.gate_up_proj']==3 and count['t.weight']==2
    assert count['odd_experts.w']==1 # 15 numbers end within a word

def test_scan_pools_experts():
    base,E = {'experts.w': randn(6, 32, 64), 'experts.w_bias': randn(6, 32)},6
    x = {k: v+.01*randn(*v.shape, seed=7) for k,v in base.items()}
    for e in range(3): x['experts.w'][e] += .03*torch.outer(randn(32, seed=e), randn(64, seed=9+e))
    row = scan(x, base, progress=False).iloc[0]
    apart = [{f'{e}.weight': s['experts.w'][e] for e in range(E)} for s in (x, base)]
    rows = scan(*apart, progress=False)
    assert row.matrices==6 and row.layout=='stacked' and tuple(row['shape'])==(6, 32, 64)
    np.testing.assert_allclose(row.snr, rows.snr.mean())
    assert row.n_spikes==rows.n_spikes.sum()>=3 and bool(row.fits)==rows.fits.all()
    np.testing.assert_allclose(row.norm, (x['experts.w']-base['experts.w']-0).double().norm(), rtol=1e-2)
    broken = {k: v.clone() for k,v in x.items()}
    broken['experts.w'][4,1,2] = float('nan')
    with pytest.raises(ValueError, match=r'experts.w\[4\] holds 1 NaN'): scan(broken, base, progress=False)

@pytest.mark.parametrize('estimator', ['paper_nlp','paper_vision','spectrum'])
def test_published_measures_read_as_published(estimator):
    net = zoo()
    table = scan(net, estimator=estimator, progress=False).set_index('name')
    for k in table.index: np.testing.assert_allclose(table.snr[k], snr(net[k], estimator), rtol=1e-6)
    assert (table.matrices==1).all()

def test_own_estimators_get_out_in():
    seen = []
    @rule('estimator')
    def shape_of(W):
        seen.append(W.copy())
        return 1.
    net = {'a.weight': randn(6, 9), 'a.bias': randn(9), 'sq.weight': randn(9, 9), 'sq.bias': randn(9)}
    scan(net, estimator='shape_of', progress=False, n_workers=1)
    del rules['shape_of']
    want = {k: net[k].T.double().numpy() for k in ('a.weight','sq.weight')}
    assert all(any(np.array_equal(o, w) for o in seen) for w in want.values())

@pytest.mark.parametrize('normed', [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm,
    nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.filterwarnings('ignore')
def test_a_normed_layer_is_one_unit(normed):
    net = nn.ModuleDict(dict(conv=normed(nn.Conv1d(8, 16, 3)), fc1=normed(nn.Linear(8, 4)), up=normed(nn.ConvTranspose1d(8, 4, 3))))
    units = find_units(infos(net))
    assert set(units.unit)=={'conv','fc1','up'}
    assert (units.groupby('unit').role.agg(list).map(lambda o: o.count('matrix'))==1).all()
    found = layouts(infos(net))
    assert {owner_of(k): o.kind for k,o in found.items() if o.is_matrix}==dict(conv='conv', fc1='linear', up='transposed conv')
    assert {k: o.kind for k,o in found.items() if o.is_matrix}=={k: o.kind for k,o in module_layouts(net).items()}

def test_positional_convolution_of_wav2vec2():
    net = build('wav2vec2')
    units = find_units(infos(net))
    at = 'encoder.pos_conv_embed.conv'
    assert set(units.unit[[k for k in units.index if k.startswith(at)]])=={at}
    assert units.role[f'{at}.parametrizations.weight.original1']=='matrix'
    assert units.role[f'{at}.parametrizations.weight.original0']=='bias'

@pytest.mark.parametrize('strategy', ['standard', *(k for k in rule_names('layer') if rules[k].asks('snr', 'hi'))])
def test_plans_of_mixtures(strategy):
    config = tf.GptOssConfig(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    torch.manual_seed(0)
    base = {k: v.clone() for k,v in tf.GptOssForCausalLM(config).state_dict().items()}
    x,y = tuned(base, 1),tuned(base, 2)
    plan = make_plan(strategy, dict(x=x, y=y), base)
    at = 'model.layers.0.mlp.experts'
    rows = plan.table.set_index('name').loc[[f'{at}.{o}' for o in ('gate_up_proj','gate_up_proj_bias','down_proj','down_proj_bias')]]
    assert set(rows.unit)=={at} and rows.role.tolist()==['matrix','bias','matrix','bias']
    assert (rows[['base','x','y']].nunique()==1).all()
    merge(plan, dict(x=x, y=y), base)

def test_grams_of_transposed_and_stacked():
    base = {'a.weight': randn(6, 9), 'a.bias': randn(9), 'experts.w': randn(3, 5, 4), 'experts.w_bias': randn(3, 5)}
    models = dict(x=tuned(base, 1), y=tuned(base, 2))
    def moments(n, seed): return (z := randn(40, n, seed=seed)).T@z/40
    grams = {m: {'a.weight': moments(6, i), 'experts.w': torch.stack([moments(4, 10*i+e) for e in range(3)])}
        for i,m in enumerate('xy', 1)}
    got = merge(plan := make_plan('regmean', models, base), models, base, grams=grams)
    what = recipe('regmean')
    want = run_operation(what, [models[m]['a.weight'].T.numpy() for m in 'xy'], base['a.weight'].T.numpy(), [1, 1], [grams[m]['a.weight'].numpy() for m in 'xy'])
    torch.testing.assert_close(got['a.weight'].T.double(), torch.tensor(want), atol=1e-5, rtol=1e-5)
    for e in range(3):
        want = run_operation(what, [models[m]['experts.w'][e].numpy() for m in 'xy'], base['experts.w'][e].numpy(), [1, 1], [grams[m]['experts.w'][e].numpy() for m in 'xy'])
        torch.testing.assert_close(got['experts.w'][e].double(), torch.tensor(want), atol=1e-5, rtol=1e-5)
    del grams['y']['experts.w']
    with pytest.raises(PreflightError, match='needs moments of 4 inputs of each of 3 matrices of y, found none'):
        merge(plan, models, base, grams=grams)
    grams['y']['a.weight'] = moments(9, 1)
    with pytest.raises(PreflightError, match='needs moments of 6 inputs of y, found'): merge(plan, models, base, grams=grams)

class Net(nn.Module):
    def __init__(self, layer, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.a,self.b,self.c = layer(12, 20),layer(20, 20),layer(20, 5)
    def forward(self, x): return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

def both(seed):
    "The same network of linear layers and of `Conv1D`"
    plain,turned = Net(nn.Linear, seed).eval(),Net(lambda i, o: Conv1D(o, i), seed).eval()
    turned.load_state_dict(as_other(plain.state_dict()))
    return plain,turned
def as_other(sd): return {k: v.T.contiguous() if v.dim()==2 else v for k,v in sd.items()}
def mean(a, b):
    m = copy.deepcopy(a)
    m.load_state_dict({k: (v+b.state_dict()[k])/2 for k,v in a.state_dict().items()})
    return m
def assert_same(plain, turned):
    turned = as_other(turned)
    for k,v in plain.items(): torch.testing.assert_close(v, turned[k], atol=1e-5, rtol=1e-5)

def test_conv1d_is_fitted_repaired_and_aligned():
    (a,ta),(b,tb),x = both(1),both(2),[randn(64, 12, seed=i) for i in range(4)]
    grams = [input_grams(o, x) for o in (a, ta)]
    for k,v in grams[0].items(): assert v.equal(grams[1][k])
    fitted = [match_layers(mean(*o), dict(a=o[0], b=o[1]), dict(a=x, b=x))['a'].state_dict() for o in ((a, b), (ta, tb))]
    assert_same(*fitted)
    assert not torch.allclose(fitted[0]['c.weight'], mean(a, b).c.weight)
    assert_same(*[repair_channels(mean(*o), list(o), x).state_dict() for o in ((a, b), (ta, tb))])
    spec = align.tested_spec(ta, x[0])
    assert set(spec)=={'a','b'} and spec['a']==[('a.weight', 1), ('a.bias', 0), ('b.weight', 0)]
    moved = copy.deepcopy(ta)
    moved.load_state_dict(align.permute(ta.state_dict(), dict(a=np.random.default_rng(0).permutation(20)), spec))
    assert torch.allclose(moved(x[0]), ta(x[0]), atol=1e-5) and not torch.allclose(moved.a.weight, ta.a.weight)

def test_one_matrix_in_the_papers_way():
    assert flat_layout((4, 3, 2)).matrix==(4, 6) and flat_layout((5,)).matrix==(1, 5) and not flat_layout(()).is_matrix
