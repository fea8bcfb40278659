"Layers are found in running order, their inputs measured, and fitted to what experts compute."
import pytest, torch, torch.nn.functional as F
from torch import nn
from spectrum_merging.activations import Layer, input_grams, layer_order, patches, rows
from spectrum_merging.match import match_heads, match_layers

def seeded(f, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return f().eval()

def cnn(): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
    nn.Conv2d(8, 12, 3, stride=2, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(),
    nn.Linear(12*9, 4))
def mlp(): return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.ReLU(),
    nn.Linear(16, 3))
def images(n=256, seed=0, shape=(3, 8, 8)):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))

@pytest.mark.parametrize('how', [dict(), dict(stride=2), dict(padding=1), dict(padding=(2, 0)),
    dict(dilation=2, padding=2), dict(padding='same'), dict(padding='same', dilation=(1, 2)),
    dict(padding='valid'), dict(kernel_size=1), dict(kernel_size=1, stride=2),
    dict(kernel_size=1, padding=1), dict(kernel_size=(2, 3), stride=(1, 2)),
    dict(kernel_size=(4, 2), padding='same')], ids=str)
def test_patches(how):
    "A convolution is its patches times its matrix"
    m = seeded(lambda: nn.Conv2d(3, 5, **dict(kernel_size=3, bias=False) | how), 0)
    x = images(4)
    with torch.no_grad(): z = m(x)
    torch.testing.assert_close(patches(x, m)@m.weight.flatten(1).T, rows(z, m), atol=1e-5, rtol=1e-5)

def test_layer_order():
    net = seeded(cnn, 0)
    assert layer_order(net, images(4), heads=['7'])==[Layer('0', '1'), Layer('3', '4')]
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.late,self.early = nn.Linear(4, 4),nn.Linear(6, 4)
            self.fc = nn.Linear(4, 2)
        def forward(self, x): return self.fc(self.late(self.early(x)).relu())
    net = Odd().train()
    assert [o.name for o in layer_order(net, torch.randn(8, 6))]==['early','late']
    assert net.training
    net.late = net.fc = nn.Linear(4, 4)
    with pytest.raises(ValueError, match='runs 2 times'): layer_order(net, torch.randn(8, 6))
    with pytest.raises(ValueError, match='no convolution or linear'):
        layer_order(nn.Sequential(nn.ReLU()), torch.randn(8, 6))

def test_grouped_convolutions_stay():
    net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8, 2))
    x = images(64, shape=(4, 3, 3))
    assert [o.name for o in layer_order(net, x, heads=['3'])]==['0']
    with pytest.raises(ValueError, match="a grouped convolution.*least=0"): match_layers(net, dict(a=net), dict(a=[x]), heads=["3"])
    fitted = match_layers(net, dict(a=seeded(lambda: nn.Sequential(nn.Conv2d(4, 8, 1),
        nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8, 2)), 1)), dict(a=[x]), heads=["3"], least=0)
    assert fitted['a'][1].weight.equal(net[1].weight)

def test_input_grams():
    net,x = seeded(cnn, 0),images(32)
    grams = input_grams(net, [x[:16], x[16:]], heads=['7'])
    assert list(grams)==['0.weight','3.weight']
    u = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 27)
    torch.testing.assert_close(grams['0.weight'], u.T@u/len(u), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='empty'): input_grams(net, [])

def test_taps_on_padding():
    "3 × 3 kernels on 1 × 1 images: the centre is fitted, what only padding reaches keeps the start"
    def make(): return nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    expert,start,x = seeded(make, 1),seeded(make, 2),images(400, shape=(6, 1, 1))
    u = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 54)
    gram = input_grams(expert, [x[:200], x[200:]])['0.weight']
    torch.testing.assert_close(gram, u.T@u/len(u), rtol=1e-4, atol=1e-5)
    fitted = match_layers(start, dict(a=expert), dict(a=[x]), ridge=1e-7, heads=['4'])['a']
    with torch.no_grad(): a,b = fitted[:-1](x),expert[:-1](x)
    assert ((a-b)**2).mean() < 1e-4*b.var()
    edge = torch.ones(3, 3, dtype=torch.bool)
    edge[1,1] = False
    kept,was = (o[0].weight[:,:,edge].flatten(1) for o in (fitted, start))
    assert F.cosine_similarity(kept, was).min() > 1-1e-5

@pytest.mark.parametrize('statistics', ['shared','per task'])
@pytest.mark.parametrize('make,x,heads', [(cnn, images(600), ['7']),
    (mlp, images(600, shape=(6,)), ['4'])], ids=['cnn','mlp'])
def test_one_expert_is_found_again(make, x, heads, statistics):
    "From any start, the fit to one model computes what that model computes"
    expert,start = seeded(make, 1),seeded(make, 2)
    before = {k: v.clone() for o in (expert, start) for k,v in o.state_dict().items()}
    fitted = match_layers(start, dict(a=expert), dict(a=list(x.split(200))), statistics=statistics,
        ridge=1e-7, heads=heads)['a']
    with torch.no_grad(): a,b = fitted[:-1](x),expert[:-1](x)
    assert ((a-b)**2).mean() < 1e-4*b.var()
    assert all(v.equal(before[k]) for k,v in start.state_dict().items())
    assert fitted[-1].weight.equal(start[-1].weight)

def test_in_place_operations():
    "ReLUs in place and residual sums do not spoil what was captured"
    from torchvision.models.resnet import BasicBlock
    def make(): return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        BasicBlock(8, 8), BasicBlock(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    x = images(400)
    expert,start = seeded(make, 1),seeded(make, 2)
    fitted = match_layers(start, dict(a=expert), dict(a=list(x.split(200))), ridge=1e-7, heads=['7'])['a']
    with torch.no_grad(): a,b = fitted[:-1](x),expert[:-1](x)
    assert ((a-b)**2).mean() < 1e-3*b.var()

def test_under_autocast():
    "bf16 around the call: layers see the weights of the layers fitted before them"
    expert,start,x = seeded(cnn, 1),seeded(cnn, 2),images(600)
    with torch.autocast('cpu', torch.bfloat16):
        fitted = match_layers(start, dict(a=expert), dict(a=[x]), ridge=1e-5, heads=['7'])['a']
    with torch.no_grad(): a,b = fitted[:-1](x),expert[:-1](x)
    assert ((a-b)**2).mean() < 1e-3*b.var()

@pytest.mark.parametrize('seed', range(3))
def test_better_than_averaging(seed):
    "Two experts from one base: fitted layers are closer to both than their mean"
    base = seeded(cnn, seed)
    x = {t: images(500, i)*s for i,(t,s) in enumerate(dict(a=1., b=.5).items())}
    experts = {}
    for i,t in enumerate(x):
        experts[t] = seeded(cnn, seed)
        g = torch.Generator().manual_seed(10+i)
        for p in experts[t].parameters(): p.data += .1*torch.randn(p.shape, generator=g)
    mean = seeded(cnn, seed)
    mean.load_state_dict({k: sum(e.state_dict()[k] for e in experts.values())/2
        for k in base.state_dict()})
    def error(m, t):
        with torch.no_grad(): a,b = m[:-1](x[t]),experts[t][:-1](x[t])
        return (((a-b)**2).mean()/b.var()).item()
    fitted = match_layers(mean, experts, {t: [o] for t,o in x.items()}, heads=['7'])
    assert sum(error(fitted[t], t) for t in x) < .7*sum(error(mean, t) for t in x)
    a,b = (o.state_dict() for o in fitted.values())
    assert all(v.equal(b[k]) for k,v in a.items())

def test_masks():
    "What stands at padded positions has no influence; sequences of different length are fitted alike"
    def make(): return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12), nn.Linear(12, 3))
    expert,start = seeded(make, 1),seeded(make, 2)
    g = torch.Generator().manual_seed(0)
    x,mask = torch.randn(90, 7, 12, generator=g),torch.arange(7)<torch.randint(2, 6, (90,1), generator=g)
    def fit(pad, masks):
        z = torch.where(mask[...,None], x, pad*torch.randn(x.shape, generator=g))
        return match_layers(start, dict(a=expert), dict(a=list(z.split(30))), masks=masks, ridge=1e-4,
            heads=['3'])['a']
    a,b = (fit(pad, dict(a=list(mask.split(30)))) for pad in (0, 9))
    assert all(v.equal(b.state_dict()[k]) for k,v in a.state_dict().items())
    cut = [(x[i:i+30,:n], mask[i:i+30,:n]) for i in (0, 30, 60) for n in [int(mask[i:i+30].sum(1).max())]]
    c = match_layers(start, dict(a=expert), dict(a=[o for o,_ in cut]), masks=dict(a=[o for _,o in cut]),
        ridge=1e-4, heads=['3'])['a']
    assert all(torch.allclose(v, c.state_dict()[k], atol=1e-4) for k,v in a.state_dict().items())
    def error(m):
        with torch.no_grad(): return (m[:-1](x)-expert[:-1](x))[mask].square().mean().item()
    assert error(a) < .05*error(start)
    with pytest.raises(ValueError, match='masks for .* 30.*90'):
        match_layers(start, dict(a=expert), dict(a=[x]), masks=dict(a=[mask[:30]]), heads=['3'])

def test_modes_and_wrong_input():
    net,x = seeded(cnn, 0).train(),[images(64)]
    expert = seeded(cnn, 1).train()
    expert[1].eval() # a frozen BatchNorm
    fitted = match_layers(net, dict(a=expert), dict(a=x), heads=['7'])
    input_grams(expert, x, heads=['7']), match_heads(net, dict(a=expert), dict(a=x), heads=['7'])
    assert net.training and net[1].training and not fitted['a'].training
    assert expert.training and expert[4].training and not expert[1].training
    for how,words in ((dict(statistics='own'), "choose 'shared'"), (dict(ridge=0.), 'positive')):
        with pytest.raises(ValueError, match=words): match_layers(net, dict(a=net), dict(a=x), **how)
    with pytest.raises(ValueError, match='same tasks'): match_layers(net, dict(a=net), dict(b=x))
    with pytest.raises(ValueError, match='empty'): match_layers(net, dict(a=net), dict(a=[]))
    dead = match_layers(net, dict(a=expert), dict(a=[torch.zeros(32, 3, 8, 8)]), heads=['7'])['a']
    assert all(v.isfinite().all() for v in dead.state_dict().values() if v.is_floating_point())

@pytest.mark.parametrize('make,shape,heads', [(cnn, (3, 8, 8), ['7']), (mlp, (6,), ['4']),
    (lambda: nn.Sequential(mlp()[:3], nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)), (6,), ['1','3'])],
    ids=['cnn','mlp','two layers'])
def test_heads_are_found_again(make, shape, heads):
    "Features turned by a matrix: the fitted head reads them as the expert's head read its own"
    expert,x,new = seeded(make, 1),images(900, shape=shape),images(200, 1, shape)
    turned = seeded(make, 1)
    last = expert.get_submodule(heads[0])
    turn = torch.randperm(last.in_features, generator=torch.Generator().manual_seed(0))
    class Turned(nn.Module):
        def __init__(self, net, turn):
            super().__init__()
            self.body,self.classifier = net[:int(heads[0])],net[int(heads[0]):]
            self.register_buffer('turn', turn)
        def forward(self, x): return self.classifier(self.body(x)[:,self.turn])
    first = Turned(expert, torch.arange(last.in_features))
    merged = Turned(turned, turn)
    before = {k: v.clone() for k,v in merged.state_dict().items()}
    fitted = match_heads(merged, dict(a=first), dict(a=list(x.split(300))), ridge=1e-7)['a']
    with torch.no_grad(): a,b,c = (o(new) for o in (fitted, first, merged))
    assert ((a-b)**2).mean() < 1e-3*b.var() < .1*((c-b)**2).mean()
    assert all(v.equal(before[k]) for k,v in merged.state_dict().items())
    body = {k: v for k,v in fitted.state_dict().items() if k[:5]!='class'}
    assert all(v.equal(before[k]) for k,v in body.items())

def test_heads_of_several_tasks():
    "Heads of different size over one body; each is fitted to its own inputs, in any mode, under autocast"
    def make(n, seed): return nn.Sequential(seeded(mlp, seed)[:4], nn.Linear(16, n))
    experts = dict(a=make(3, 1).train(), b=make(5, 2))
    x = {t: list(images(400, i, (6,)).split(100)) for i,t in enumerate(experts)}
    with torch.autocast('cpu', torch.bfloat16):
        found = match_heads(make(2, 3), experts, x, heads=['1'])
    assert [tuple(o[1].weight.shape) for o in found.values()]==[(3, 16), (5, 16)]
    assert experts['a'].training and found['a'][1].weight.requires_grad
    alone = match_heads(dict(b=make(2, 3)), dict(b=experts['b']), dict(b=x['b']), heads=['1'])['b']
    assert F.cosine_similarity(alone[1].weight, found['b'][1].weight).min() > .98 # bf16
    strong = match_heads(make(2, 3), experts, x, heads=['1'], ridge=1e6)['b'][1].weight
    assert F.cosine_similarity(strong, experts['b'][1].weight).min() > .999

def test_heads_over_shared_layers():
    "A body that runs one layer twice, as ALBERT does, has heads to fit all the same"
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first,self.classifier = nn.Linear(6, 6),nn.Linear(6, 3)
        def forward(self, x): return self.classifier(self.first(self.first(x).relu()).relu())
    merged,expert,x = seeded(Twice, 1),seeded(Twice, 2),images(300, shape=(6,))
    fitted = match_heads(merged, dict(a=expert), dict(a=[x]))['a']
    before = seeded(Twice, 1)
    before.classifier.load_state_dict(expert.classifier.state_dict())
    def far(m):
        with torch.no_grad(): return ((m(x)-expert(x))**2).mean().item()
    assert far(fitted) < .5*far(before)

def test_heads_per_position():
    "A head that answers at every position: what is padding has no influence"
    def make(): return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 3))
    expert,merged = seeded(make, 1),seeded(make, 2)
    g = torch.Generator().manual_seed(0)
    x,mask = torch.randn(90, 7, 12, generator=g),torch.arange(7)<torch.randint(2, 6, (90,1), generator=g)
    a,b = (match_heads(merged, dict(a=expert), dict(a=list(torch.where(mask[...,None], x, pad).split(30))),
        masks=dict(a=list(mask.split(30))), heads=['2'])['a'][2] for pad in (0., 9.))
    assert a.weight.equal(b.weight) and a.bias.equal(b.bias)
    c = match_heads(merged, dict(a=expert), dict(a=list(torch.where(mask[...,None], x, 9.).split(30))),
        heads=['2'])['a'][2]
    assert not torch.allclose(a.weight, c.weight, atol=1e-3)

def test_wrong_input_for_heads():
    net,x = seeded(mlp, 0),[images(64, shape=(6,))]
    def run(merged=net, experts=None, batches=None, **how):
        return match_heads(merged, experts or dict(a=net), batches or dict(a=x), **dict(heads=['4']) | how)
    for how,words in ((dict(ridge=0.), 'positive'), (dict(batches=dict(b=x)), 'same tasks'),
            (dict(batches=dict(a=[])), 'empty'), (dict(merged=dict(b=net)), 'same tasks'),
            (dict(heads=['9']), 'no linear layer in a head'),
            (dict(merged=seeded(cnn, 0)), r'0.weight is \(8, 3, 3, 3\) in the merged model, \(16, 6\)'),
            (dict(merged=net[:2]), 'missing')):
        with pytest.raises(ValueError, match=words): run(**how)
    assert all(v.isfinite().all() for v in run(batches=dict(a=[torch.zeros(8, 6)]))['a'].state_dict().values())
    assert run(batches=dict(a=[x[0][:1]]))['a'](x[0]).isfinite().all()
