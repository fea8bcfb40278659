"Specs move all that belongs together and nothing else; matching finds what was shuffled."
import copy, numpy as np, pytest, torch, torchvision
from itertools import permutations
from spectrum_merging.align import align, match_weights, permutation_spec, permute
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

def sizes(state, spec): return {g: min(state[k].shape[n] for k,n in o) for g,o in spec.items()}

def shuffled(state, spec, seed):
    rng = np.random.default_rng(seed)
    perms = {g: rng.permutation(n) for g,n in sizes(state, spec).items()}
    return permute(state, perms, spec),perms

def randomised(m, seed=0):
    "Evaluation mode, with statistics and scales in which every unit differs"
    gen = torch.Generator().manual_seed(seed)
    for k,t in m.state_dict().items():
        if t.ndim==1: t.copy_(torch.rand(t.shape, generator=gen)+.5)
        elif t.ndim>1: t.copy_(torch.randn(t.shape, generator=gen)/t[0].numel()**.5)
    return m.eval()

def loaded(m, state):
    m = copy.deepcopy(m)
    m.load_state_dict(state)
    return m

class Forward(nn.Module):
    "Modules by name, and a function of them and of an input"
    def __init__(self, f, **mods):
        super().__init__()
        self.f = f
        for k,m in mods.items(): setattr(self, k, m)
    def forward(self, x): return self.f(self, x)

def conv(i, o, **kw): return nn.Conv2d(i, o, 3, padding=1, **kw)
shared = nn.Linear(12, 12)
net = torchvision.models
models = dict(
    resnet18=lambda: net.resnet18(num_classes=10),
    resnet50=lambda: ResNet(Bottleneck, [2, 1, 1, 1], num_classes=10, width_per_group=8),
    resnext=lambda: ResNet(Bottleneck, [1, 2, 1, 1], num_classes=10, groups=4, width_per_group=4),
    mobilenet_v2=lambda: net.mobilenet_v2(width_mult=.25, num_classes=10),
    mobilenet_v3=lambda: net.mobilenet_v3_small(width_mult=.5, num_classes=10),
    densenet=lambda: net.DenseNet(8, (2, 2), 16, num_classes=10),
    shufflenet=lambda: net.shufflenet_v2_x0_5(num_classes=10),
    vit=lambda: net.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=10),
    convnext=lambda: net.ConvNeXt([net.convnext.CNBlockConfig(16, 32, 2),
        net.convnext.CNBlockConfig(32, None, 1)], num_classes=10),
    vgg=lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(8),
        conv(8, 12), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(192, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 10)),
    mlp=lambda: nn.Sequential(nn.Flatten(), nn.Linear(3*64*64, 16), nn.GELU(), nn.Linear(16, 10)),
    multiplier=lambda: nn.Sequential(conv(3, 6), conv(6, 12, groups=6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10)),
    reshape=lambda: Forward(
        lambda s,x: s.b(s.a(x).relu().mean((2, 3), True).reshape(x.size(0), -1)),
        a=conv(3, 8), b=nn.Linear(8, 10)),
    flat_view=lambda: Forward(lambda s,x: s.b(s.p(s.a(x)).view(x.shape[0], -1)),
        a=conv(3, 8), p=nn.AvgPool2d(32), b=nn.Linear(32, 10)),
    pooled=lambda: Forward(lambda s,x: s.b(s.a(x).relu().mean([-2, -1])),
        a=conv(3, 8), b=nn.Linear(8, 10)),
    concat=lambda: Forward(lambda s,x: s.c(torch.cat([s.a(x), s.b(s.a(x).relu())], 1)).flatten(1),
        a=conv(3, 4), b=conv(4, 5),
        c=nn.Sequential(conv(9, 7), nn.PReLU(7), nn.PReLU(), conv(7, 2))),
    rolled=lambda: Forward(lambda s,x: s.c(s.b(s.a(x).roll(1, 1)).relu()).flatten(1),
        a=conv(3, 4), b=conv(4, 6), c=conv(6, 2)),
    group_norm=lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 6), nn.ReLU(),
        conv(6, 4), nn.AdaptiveMaxPool2d(1), nn.Flatten()),
    gate=lambda: Forward(lambda s,x: s.d(s.a(x)*s.b(s.a(x).relu()).sigmoid()).flatten(1),
        a=conv(3, 6), b=conv(6, 1), d=conv(6, 4)),
    twice=lambda: Forward(lambda s,x: s.c(s.b(s.b(s.a(x).relu()).relu())).flatten(1),
        a=conv(3, 8), b=conv(8, 8), c=conv(8, 2)),
    tied=lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), shared, nn.ReLU(), shared,
        nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)),
    layer_norm=lambda: nn.Sequential(nn.Flatten(), nn.Linear(3*64*64, 16), nn.LayerNorm(16),
        nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)),
    tokens=lambda: Forward(
        lambda s,x: s.c(s.n(s.a(x.flatten(1, 2))).relu()).flatten(1),
        a=nn.Linear(64, 48), n=nn.BatchNorm1d(192), c=nn.Sequential(nn.Linear(48, 8), nn.ReLU(),
        nn.Linear(8, 2))))

@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('name', models)
@torch.no_grad()
def test_function_is_the_same(name, seed):
    m,x = randomised(models[name]()),torch.randn(2, 3, 64, 64)
    spec = permutation_spec(m)
    other,perms = shuffled(m.state_dict(), spec, seed)
    assert any((p!=np.arange(len(p))).any() for p in perms.values())
    want,got = m(x),loaded(m, other)(x)
    top = want.abs().max().item()
    assert top>1e-3 and torch.allclose(got, want, rtol=1e-4, atol=1e-5*top)

@pytest.mark.parametrize('name,free', [('concat',['c.0']), ('rolled',['b']), ('group_norm',['2']),
    ('gate',['a']), ('vgg',['0','4','9']), ('mlp',['1']), ('multiplier',['0']),
    ('layer_norm',['3']),
    ('vit',['encoder.layers.encoder_layer_0.mlp.0','encoder.layers.encoder_layer_1.mlp.0'])])
def test_groups(name, free): assert list(permutation_spec(models[name]()))==free

def basic_spec(blocks):
    "The ResNet-18/34 spec by hand"
    def bn(k): return [(f'{k}.{o}', 0) for o in ('weight','bias','running_mean','running_var')]
    res,stream = {},'conv1'
    res[stream] = [('conv1.weight', 0), *bn('bn1')]
    for s,n in enumerate(blocks, 1):
        for b in range(n):
            p,old = f'layer{s}.{b}',stream
            if s>1 and b==0: # a downsample ends the stream
                stream = f'{p}.conv2'
                res[stream] = [(f'{p}.downsample.0.weight', 0), *bn(f'{p}.downsample.1')]
                res[old].append((f'{p}.downsample.0.weight', 1))
            res[old].append((f'{p}.conv1.weight', 1))
            res[f'{p}.conv1'] = [(f'{p}.conv1.weight', 0), *bn(f'{p}.bn1'),
                (f'{p}.conv2.weight', 1)]
            res[stream] += [(f'{p}.conv2.weight', 0), *bn(f'{p}.bn2')]
    res[stream].append(('fc.weight', 1))
    return res

@pytest.mark.parametrize('blocks', [[2, 2, 2, 2], [3, 4, 6, 3]], ids=['18','34'])
def test_resnet_spec(blocks):
    with torch.device('meta'): spec = permutation_spec(ResNet(BasicBlock, blocks))
    got,want = ({g: sorted(o) for g,o in s.items()} for s in (spec, basic_spec(blocks)))
    assert got==want

def test_resnet50_spec():
    with torch.device('meta'): spec = permutation_spec(torchvision.models.resnet50())
    assert len(spec)==2*16+5 # two inside each block, the stem, and one stream per stage
    assert ('layer1.2.conv3.weight', 0) in spec['layer1.0.conv3']

@pytest.mark.parametrize('seed', range(3))
@torch.no_grad()
def test_resnet18_is_recovered(seed):
    torch.manual_seed(seed)
    m,x = torchvision.models.resnet18(num_classes=10).eval(),torch.randn(2, 3, 32, 32)
    spec = permutation_spec(m)
    other,perms = shuffled(m.state_dict(), spec, seed)
    want = m(x)
    assert torch.allclose(loaded(m, other)(x), want, atol=1e-5*want.abs().max().item())
    back,table = align(other, m.state_dict(), spec, seed)
    assert all(v.equal(back[k]) for k,v in m.state_dict().items())
    assert (table.moved>0).all() and np.allclose(table.after, 1)
    assert table['size'].to_dict()==sizes(other, spec)

@pytest.mark.parametrize('name', ['vgg','mlp','multiplier','pooled','mobilenet_v3','vit'])
@pytest.mark.parametrize('seed', range(2))
def test_recovered(name, seed):
    m = randomised(models[name](), seed)
    spec = permutation_spec(m)
    other,perms = shuffled(m.state_dict(), spec, seed+1)
    got = match_weights(m.state_dict(), other, spec, seed)
    for g,p in perms.items(): assert (got[g]==np.argsort(p)).all(), g

@pytest.mark.parametrize('noise', [0, .1, .5])
@pytest.mark.parametrize('seed', range(2))
def test_one_base_moves_nothing(noise, seed):
    m = randomised(models['vgg']())
    gen = torch.Generator().manual_seed(seed)
    def tuned(): return {k: v+noise*v.std()*torch.randn(v.shape, generator=gen) if v.ndim else v
        for k,v in m.state_dict().items()}
    a,b = tuned(),tuned()
    spec = permutation_spec(m)
    res,table = align(b, a, spec, seed)
    assert list(res)==list(b) and all(res[k] is b[k] for k in b)
    assert not table.moved.any() and set(table.outcome)=={'in order already'}
    assert (table.before==table.after).all()

def test_ties_stay():
    "Units that are all alike, or all 0, could stand anywhere"
    m = models['vgg']()
    spec = permutation_spec(m)
    for fill in (0, 1, -.3):
        a,b = ({k: torch.full_like(v, f) for k,v in m.state_dict().items()} for f in (fill, 1))
        assert all((p==np.arange(len(p))).all() for p in match_weights(a, b, spec).values())

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('name', ['vgg','twice','mlp','gate'])
def test_similarity_never_falls(name, seed):
    "Also where one tensor has a group on both axes"
    a,b = (randomised(models[name](), seed*2+i).state_dict() for i in (0, 1))
    spec = permutation_spec(models[name]())
    res,table = align(b, a, spec, seed)
    ks = {k for o in spec.values() for k,_ in o if 'running' not in k}
    def total(s): return sum((a[k].double()*s[k].double()).sum() for k in ks)
    assert total(res)>=total(b) and (table.outcome=='reordered').equals(table.moved>0)
    again = match_weights(a, res, spec, seed)
    assert name=='twice' or all((p==np.arange(len(p))).all() for p in again.values())

def test_one_hidden_layer_is_optimal():
    torch.manual_seed(0)
    a,b = (nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).state_dict() for _ in 'ab')
    spec = permutation_spec(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))
    def total(p):
        s = permute(b, {'0': np.array(p)}, spec)
        return sum((a[k]*s[k]).sum().item() for k in a)
    best = max(map(total, permutations(range(5))))
    assert total(match_weights(a, b, spec)['0'])==pytest.approx(best)

def test_statistics_move_but_have_no_say():
    m = randomised(models['vgg']())
    spec,a = permutation_spec(m),m.state_dict()
    other,_ = shuffled(a, spec, 0)
    loud = {k: 1e6*torch.rand_like(v) if 'running' in k else v for k,v in other.items()}
    x,y = match_weights(a, other, spec),match_weights(a, loud, spec)
    assert all((x[g]==y[g]).all() for g in spec)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    m = randomised(models['vgg']()).to(dtype)
    spec = permutation_spec(m)
    other,_ = shuffled(m.state_dict(), spec, 0)
    back,_ = align(other, m.state_dict(), spec)
    assert all(v.equal(back[k]) and v.dtype==back[k].dtype for k,v in m.state_dict().items())

def test_inputs_are_left_alone():
    m = randomised(models['vgg']())
    a,before = m.state_dict(),copy.deepcopy(m.state_dict())
    other,_ = shuffled(a, permutation_spec(m), 0)
    kept = copy.deepcopy(other)
    align(other, a, permutation_spec(m))
    assert all(a[k].equal(before[k]) and other[k].equal(kept[k]) for k in a)

class Branch(nn.Module):
    def forward(self, x): return x if x.sum()>0 else -x

@pytest.mark.parametrize('m,words', [(Branch(), 'Branch cannot be traced.*by hand'),
    (nn.Linear(2, 2), 'Linear has no hidden units'),
    (nn.Sequential(nn.Linear(2, 3)), 'Sequential has no hidden units'),
    (nn.Sequential(conv(3, 4), nn.LayerNorm(8), conv(4, 2)), 'no hidden units')])
def test_spec_refuses(m, words):
    with pytest.raises(ValueError, match=words): permutation_spec(m)

mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
state = mlp.state_dict()
spec = permutation_spec(mlp)

@pytest.mark.parametrize('change,spec,words', [
    ({'0.weight': torch.ones(5, 3)}, spec, r'0.weight has shapes \(4, 3\) and \(5, 3\).*one arch'),
    ({'0.weight': torch.full((4, 3), float('nan'))}, spec, '0.weight of the second.*NaN'),
    ({}, {'0': [('lost.weight', 0)]}, 'lost.weight of group 0 .* not in every'),
    ({}, {'0': [('0.weight', 2)]}, r'0.weight has shape \(4, 3\) and no axis 2'),
    ({}, {'0': [('0.weight', 0), ('0.weight', 1)]}, '0.weight has 4 entries on axis 0.*0 3 units')],
    ids='shape nan lost axis multiple'.split())
def test_match_refuses(change, spec, words):
    for f in (lambda a, b: match_weights(a, b, spec), lambda a, b: align(b, a, spec)):
        with pytest.raises(ValueError, match=words): f(state, state|change)

@pytest.mark.parametrize('perms,words', [({'x': [0]}, 'group x is not in the spec: it has 0'),
    ({'0': [0, 1, 2]}, 'group 0 has 4 units.*0..3'), ({'0': [0, 1, 2, 2]}, 'group 0 has 4 units')])
def test_permute_refuses(perms, words):
    with pytest.raises(ValueError, match=words): permute(state, perms, spec)

def test_permute_some():
    "Groups that are not named stay, tensor by tensor"
    assert all(v is state[k] for k,v in permute(state, {}, spec).items())
    got = permute(state, {'0': [3, 1, 2, 0]}, spec)
    assert got['0.bias'].equal(state['0.bias'][[3,1,2,0]]) and got['2.bias'] is state['2.bias']
    assert got['2.weight'].equal(state['2.weight'][:,[3,1,2,0]])
