"Every kind of model merges, is written, and loads back: encoders, decoders, tied weights, kernels."
import json, pytest, torch, torchvision
from spectrum_merging.checkpoint import Checkpoint
from spectrum_merging.merge import load_task, merge, task_state
from spectrum_merging.plan import make_plan
from spectrum_merging.verify import verify

def hf(name, config, **kw):
    "A function of a seed that makes a small transformers model"
    def make(seed):
        import transformers as t
        torch.manual_seed(seed)
        m = getattr(t, name)(getattr(t, config)(**kw)).eval()
        with torch.no_grad():
            for p in m.parameters(): p += .02*torch.randn_like(p)
        return m
    return make

small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
bert = dict(small, vocab_size=60, max_position_embeddings=20)
def tv(make):
    def made(seed):
        torch.manual_seed(seed)
        return make().eval()
    return made
def convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=3)

models = dict(
    bert=hf('BertModel', 'BertConfig', **bert),
    bert2=hf('BertForSequenceClassification', 'BertConfig', **bert, num_labels=2),
    bert6=hf('BertForSequenceClassification', 'BertConfig', **bert, num_labels=6),
    bert_mlm=hf('BertForMaskedLM', 'BertConfig', **bert),
    gpt2=hf('GPT2LMHeadModel', 'GPT2Config', n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=20),
    llama=hf('LlamaForCausalLM', 'LlamaConfig', **small, vocab_size=60, num_key_value_heads=2),
    vit=hf('ViTForImageClassification', 'ViTConfig', **small, image_size=8, patch_size=4, num_labels=3),
    t5=hf('T5ForConditionalGeneration', 'T5Config', d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        vocab_size=60),
    resnet=tv(lambda: torchvision.models.resnet18(num_classes=4)), convnext=tv(convnext))
is_hf = [k for k in models if k not in ('resnet','convnext')]

def inputs(m):
    ids = torch.arange(2*7).view(2, 7) % 50
    if not hasattr(m, 'config'): return dict(x=torch.ones(1, 3, 64, 64).cumsum(2)/64)
    if 'vit' in m.config.model_type: return dict(pixel_values=torch.ones(2, 3, 8, 8).cumsum(3)/8)
    return dict(input_ids=ids) | (dict(decoder_input_ids=ids) if 't5' in m.config.model_type else {})

def answer(m):
    with torch.no_grad(): out = m(**inputs(m)) if hasattr(m, 'config') else m(*inputs(m).values())
    return out if isinstance(out, torch.Tensor) else out[0]

def save(m, d):
    if hasattr(m, 'config'): m.save_pretrained(d)
    else:
        d.mkdir()
        torch.save(m.state_dict(), d/'m.pth')
    return d

@pytest.mark.parametrize('strategy', ['standard', 'base_reset', 'snr_winner'])
@pytest.mark.parametrize('kind', models)
def test_merges_and_loads(kind, strategy, tmp_path):
    "From files and from modules the same; the folder loads and answers as the weights in memory do"
    ms,base = {k: models[kind](i) for i,k in enumerate('ab')},models[kind](2)
    paths,base_path = {k: save(m, tmp_path/k) for k,m in ms.items()},save(base, tmp_path/'base')
    how = dict(of='weights', top=50) if strategy!='standard' else {}
    plan = make_plan(strategy, paths, base_path, heads=[], **how)
    out = merge(plan, paths, base_path, tmp_path/'out')
    inside = merge(make_plan(strategy, ms, base, heads=[], **how), ms, base)
    m = models[kind](3)
    m.load_state_dict(inside)
    got = load_task(out)
    if kind!='vit': # transformers saves it under other names
        assert all(v.equal(inside[k]) for k,v in got.items())
    if kind in is_hf:
        n,info = type(m).from_pretrained(out, output_loading_info=True)
        assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
        assert answer(n.eval()).equal(answer(m))
        assert n.state_dict().keys()==m.state_dict().keys()
    else:
        n = models[kind](4)
        n.load_state_dict(got)
        assert answer(n).equal(answer(m))
    assert answer(m).isfinite().all() and not answer(m).equal(answer(ms['a']))
    assert verify(out, all=True).ok.all()

@pytest.mark.parametrize('kind', models)
def test_equal_models_come_back(kind, tmp_path):
    "Equal coefficients of equal models give the files' tensors back bit for bit"
    d = save(models[kind](0), tmp_path/'m')
    want = Checkpoint(d)
    out = merge(make_plan('standard', [d, d], heads=[]), [d, d], out=tmp_path/'out')
    got = load_task(out)
    assert [k for k in want if not got[k].equal(want.read(k))] == []

@pytest.mark.parametrize('kind', ['gpt2', 'bert_mlm', 't5'])
def test_tied_weights_are_written_once(kind, tmp_path):
    "As the source did, also when it is a module; tied again when loaded"
    ms = [models[kind](i) for i in range(2)]
    out = merge(make_plan('standard', ms, heads=[]), ms, out=tmp_path/'out')
    kept = set(Checkpoint(save(ms[0], tmp_path/'a')))
    assert set(Checkpoint(out))==kept < set(ms[0].state_dict())
    assert set(load_task(out))==set(ms[0].state_dict())

def test_each_task_is_a_model(tmp_path):
    "One body; `heads/<task>` is a folder that from_pretrained takes for that task's whole model"
    from transformers import AutoModelForSequenceClassification
    ms = dict(mood=models['bert2'](0), topic=models['bert6'](1))
    paths = {k: save(m, tmp_path/k) for k,m in ms.items()}
    plan = make_plan('snr_weighted', paths)
    merged = merge(plan, ms)
    for size in (10**9, 5000):
        out = merge(plan, paths, out=tmp_path/f'out{size}', shard_size=size)
        for k,m in ms.items():
            n,info = AutoModelForSequenceClassification.from_pretrained(out/'heads'/k,
                output_loading_info=True)
            assert not info['missing_keys'] and n.config.num_labels==m.config.num_labels
            want = task_state(merged, k)
            assert all(v.equal(want[o]) for o,v in n.state_dict().items())
            m.load_state_dict(load_task(out, k))
            assert answer(n.eval()).equal(answer(m))

def test_heads_only_rejected_by_name(tmp_path):
    "Other vocabularies are a problem with a remedy, not a crash in the middle"
    import transformers as t
    a,b = (t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=v, n_positions=20))
        for v in (60, 64))
    with pytest.raises(ValueError, match='transformer.wte.weight(.|\n)*vocabulary'):
        make_plan('standard', [save(a, tmp_path/'a'), save(b, tmp_path/'b')])
