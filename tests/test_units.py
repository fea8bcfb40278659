"Units and heads of real architectures, from names and shapes alone, in any order."
import pytest, random, torch, torchvision.models as tv
from functools import lru_cache
from spectrum_merging.checkpoint import TensorInfo
from spectrum_merging.units import find_units, is_head, is_matrix
from torch import nn
from transformers import (BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config,
    GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
    LlamaForSequenceClassification, ResNetConfig, ResNetForImageClassification, T5Config,
    T5ForConditionalGeneration, T5ForSequenceClassification, ViTConfig, ViTForImageClassification)

def infos(m): return {k: TensorInfo(tuple(v.shape), v.dtype) for k,v in m.state_dict().items()}
def info(*shape): return TensorInfo(shape, torch.float32)

bert = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
    vocab_size=20)
gpt2 = dict(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=8)
llama = dict(bert, num_key_value_heads=2)
t5 = dict(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=20)
resnet = dict(hidden_sizes=[8,16], depths=[1,1], embedding_size=8)
nets = dict( # how to build it, and its heads
    resnet18=(lambda: tv.resnet18(), ['fc']),
    vgg11_bn=(lambda: tv.vgg11_bn(), ['classifier.0','classifier.3','classifier.6']),
    mobilenet_v2=(lambda: tv.mobilenet_v2(), ['classifier.1']),
    convnext_tiny=(lambda: tv.convnext_tiny(), ['classifier.0','classifier.2']),
    vit_b_16=(lambda: tv.vit_b_16(), ['heads.head']),
    bert=(lambda: BertForSequenceClassification(BertConfig(**bert)), ['classifier']),
    bert_lm=(lambda: BertForMaskedLM(BertConfig(**bert)), []),
    gpt2=(lambda: GPT2ForSequenceClassification(GPT2Config(**gpt2)), ['score']),
    gpt2_lm=(lambda: GPT2LMHeadModel(GPT2Config(**gpt2)), []),
    llama=(lambda: LlamaForSequenceClassification(LlamaConfig(**llama)), ['score']),
    llama_lm=(lambda: LlamaForCausalLM(LlamaConfig(**llama)), []),
    t5=(lambda: T5ForConditionalGeneration(T5Config(**t5)), []),
    t5_classes=(lambda: T5ForSequenceClassification(T5Config(**t5)),
        ['classification_head.dense','classification_head.out_proj']),
    vit=(lambda: ViTForImageClassification(ViTConfig(**bert, image_size=8, patch_size=4)),
        ['classifier']),
    resnet=(lambda: ResNetForImageClassification(ResNetConfig(**resnet)), ['classifier.1']))

@lru_cache
def build(name):
    with torch.device('meta'): return nets[name][0]()

@pytest.mark.parametrize('name', nets)
def test_every_tensor_has_a_unit(name):
    net = build(name)
    units = find_units(infos(net))
    assert list(units.index)==list(net.state_dict()) and units.unit.str.len().min() > 0
    assert set(units.role) <= {'matrix','embedding','bias','norm','stat','buffer','head','other'}
    modules,params = dict(net.named_modules()),dict(net.named_parameters())
    assert set(units.unit) <= set(modules)|set(params) # a unit is named after its module

@pytest.mark.parametrize('name', nets)
def test_a_module_is_never_split(name):
    "Weight, bias and statistics of one module are in one unit"
    units = find_units(infos(build(name))).unit
    assert (units.groupby(lambda k: k.rpartition('.')[0] or k).nunique()==1).all()

@pytest.mark.parametrize('name', nets)
def test_heads(name):
    "The task head is found, and nothing in the middle of a body"
    units = find_units(infos(build(name)))
    assert sorted(set(units.unit[units.role=='head']))==nets[name][1]

def conv_before(net):
    "`{BatchNorm: convolution}`, each after the other in the same parent"
    res,seen = {},{}
    for k,m in net.named_modules():
        parent = k.rpartition('.')[0]
        if isinstance(m, nn.Conv2d): seen[parent] = k
        if isinstance(m, nn.BatchNorm2d): res[k] = seen[parent]
    return res

@pytest.mark.parametrize('name,count', [('resnet18',20), ('vgg11_bn',8), ('mobilenet_v2',52),
    ('resnet',8)])
def test_norm_sits_with_its_conv(name, count):
    net = build(name)
    units,pairs = find_units(infos(net)),conv_before(net)
    assert len(pairs)==count
    if name=='resnet18': # registered as conv1, bn1, relu, conv2, bn2
        pairs = {k: k.replace('bn', 'conv') if 'bn' in k else v for k,v in pairs.items()}
    assert {k: units.unit[f'{k}.running_var'] for k in pairs} == pairs
    for k,conv in pairs.items():
        rows = units.loc[[f'{k}.{o}' for o in nn.BatchNorm2d(1).state_dict()]]
        assert set(rows.unit)=={conv} and rows.role.tolist()==['norm','norm','stat','stat','stat']
        assert units.role[f'{conv}.weight']=='matrix'

@pytest.mark.parametrize('name', ['llama','gpt2','vit','vit_b_16','t5'])
def test_norm_before_several_matrices_stays_alone(name):
    units = find_units(infos(build(name)))
    norms,others = (set(units.unit[units.role.isin(o)]) for o in (['norm'], ['matrix','head']))
    assert norms and norms & others == set()

def test_bert_norm_sits_with_its_dense():
    units = find_units(infos(build('bert')))
    norms = units[(units.role=='norm') & units.index.str.contains('encoder')]
    assert len(norms)==8
    assert all(v==k.rpartition('.LayerNorm')[0]+'.dense' for k,v in norms.unit.items())

@pytest.mark.parametrize('name', ['bert_lm','gpt2_lm','t5'])
def test_tied(name):
    "A tied tensor belongs to the unit of the first"
    net = build(name)
    first,aliases = {},{}
    for k,p in net.named_parameters(remove_duplicate=False):
        if first.setdefault(id(p), k)!=k: aliases[k] = first[id(p)]
    units = find_units(infos(net), aliases=aliases)
    assert aliases and all(units.unit[k]==units.unit[o] for k,o in aliases.items())

@pytest.mark.parametrize('name', nets)
def test_order_does_not_matter(name):
    there = infos(build(name))
    shuffled = list(there.items())
    random.Random(0).shuffle(shuffled)
    assert find_units(dict(shuffled)).sort_index().equals(find_units(there).sort_index())

@pytest.mark.parametrize('name', ['resnet18','vgg11_bn','bert'])
@pytest.mark.parametrize('prefix', ['module.','_orig_mod.','module._orig_mod.'])
def test_wrapped(name, prefix):
    "`DataParallel` and `torch.compile` change names, not units"
    plain = find_units(infos(build(name)))
    wrapped = find_units({prefix+k: v for k,v in infos(build(name)).items()})
    assert wrapped.unit.tolist()==[prefix+o for o in plain.unit]
    assert wrapped.role.tolist()==plain.role.tolist()

def test_padded_numbers():
    "Layers called 00, 01, 02"
    there = {'net.00.weight': info(4, 4, 3, 3), 'net.01.weight': info(4), 'net.01.bias': info(4)}
    assert set(find_units(there).unit)=={'net.00'}

def test_head_statistics():
    "A norm within a head belongs to the head, its statistics too"
    head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    there = infos(nn.ModuleDict(dict(body=nn.Linear(4, 4), head=head)))
    units = find_units(there)
    assert units.index[units.role=='head'].tolist()==[k for k in there if k.startswith('head')]

@pytest.mark.parametrize('heads,found', [(None, ['fc.weight']), ([], []),
    (['out'], ['out.weight']), (['out','fc'], ['fc.weight','out.weight']), (['ou'], []),
    (['body.fc'], ['body.fc.weight'])])
def test_named_heads(heads, found):
    units = find_units({k: info(4, 4) for k in ('body.fc.weight','fc.weight','out.weight')}, heads)
    assert units.index[units.role=='head'].tolist()==found

@pytest.mark.parametrize('name', ['fc.weight', 'fc', 'classifier.0.bias', 'score.weight',
    'head.weight', 'heads.head.weight', 'qa_outputs.weight', 'classification_head.dense.weight',
    'module.fc.weight'])
def test_is_head(name): assert is_head(name)

@pytest.mark.parametrize('name', ['layer.0.fc.weight', 'fc1.weight', 'lm_head.weight',
    'header.weight', 'body.classifier.weight', 'transformer.score.weight', 'pre_classifier.weight'])
def test_is_no_head(name): assert not is_head(name)

@pytest.mark.parametrize('shape', [(2,2), (64,3,7,7), (8,1,3,3)])
def test_is_matrix(shape): assert is_matrix(shape)

@pytest.mark.parametrize('shape', [(8,1), (1,8), (1,1,768), (64,1,1), (8,), (), (0,4), (4,0),
    (4,4,0)])
def test_is_no_matrix(shape): assert not is_matrix(shape)

def test_roles():
    ids,count = TensorInfo((4,), torch.int64),TensorInfo((), torch.int64)
    roles = find_units({'emb.weight': info(9, 4), 'wte.weight': info(9, 4), 'ids': ids,
        'token_embed': info(9, 4), 'lin.weight': info(4, 4), 'lin.bias': info(4), 'scale': info(),
        'norm.weight': info(4), 'bn.num_batches_tracked': count}).role
    assert roles.to_dict()=={'emb.weight': 'matrix', 'wte.weight': 'embedding', 'ids': 'buffer',
        'token_embed': 'embedding', 'lin.weight': 'matrix', 'lin.bias': 'bias', 'scale': 'other',
        'norm.weight': 'norm', 'bn.num_batches_tracked': 'stat'}
