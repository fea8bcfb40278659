"BatchNorm statistics measured again equal direct ones, and scores equal their formulas."
import copy, numpy as np, pandas as pd, pytest, torch, torchvision
from math import sqrt
from scipy.stats import norm
from sklearn.metrics import f1_score
from spectrum_merging.evaluate import bootstrap, majority, metrics, normalise, score, score_rows, summarise, wilson
from spectrum_merging.repair import bn_layers, reestimate_bn, repair_channels, variance_ratio
from torch import nn

# --- repair

def net(seed=0, dropout=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        m = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3),
            nn.BatchNorm2d(5, momentum=.3), *[nn.Dropout(.9)]*dropout, nn.Flatten(),
            nn.Linear(80, 4), nn.BatchNorm1d(4, affine=False))
        for o in (m[1], m[4]):
            for t in (o.weight.detach(), o.bias.detach(), o.running_mean): t.normal_()
        return m

def images(n, size=8):
    return 2*torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))+.5

def normed(x, bn, mean, var):
    shape = [1, -1, *[1]*(x.ndim-2)]
    y = (x-mean.view(shape))/(var.view(shape)+bn.eps).sqrt()
    return y if bn.weight is None else y*bn.weight.view(shape)+bn.bias.view(shape)

@torch.no_grad()
def direct(m, batches):
    "`{layer: (mean, variance)}`: means over batches, each normalised by itself in the layers below"
    res = {}
    for k,o in m.named_children():
        if isinstance(o, (nn.BatchNorm1d, nn.BatchNorm2d)):
            dims = [0, *range(2, batches[0].ndim)]
            each = [torch.stack([x.mean(dims), x.var(dims)]) for x in batches]
            res[k] = sum(each)/len(each)
            batches = [normed(x, o, x.mean(dims), x.var(dims, correction=0)) for x in batches]
        else: batches = [o.eval()(x) for x in batches]
    return res

@pytest.mark.parametrize('sizes', [[40], [16, 16, 16]], ids=['all at once','batches'])
@pytest.mark.parametrize('dropout', [False, True])
def test_reestimate(sizes, dropout):
    m,x = net(dropout=dropout),images(sum(sizes))
    got = reestimate_bn(m, x.split(sizes))
    want = direct(copy.deepcopy(m), list(x.split(sizes)))
    assert list(bn_layers(got))==list(want) and len(want)==3
    for k,(mean,var) in want.items():
        bn = dict(got.named_modules())[k]
        assert torch.allclose(bn.running_mean, mean, atol=1e-5)
        assert torch.allclose(bn.running_var, var, rtol=1e-4)

def test_first_layer_mean_is_that_of_all_inputs():
    m,x = net(),images(48)
    y = m[0](x)
    got = reestimate_bn(m, x.split(12))[1]
    assert torch.allclose(got.running_mean, y.mean([0,2,3]), atol=1e-5)
    assert torch.allclose(got.running_var, y.var([0,2,3]), rtol=.02)

def test_normalises():
    "After it, one batch has mean 0 and variance 1 in evaluation mode as well"
    m,x = net(),images(64)
    y = reestimate_bn(m, [x])(x)
    assert torch.allclose(y.mean(0), torch.zeros(4), atol=.01)
    assert torch.allclose(y.var(0), torch.ones(4), rtol=.01)

@pytest.mark.parametrize('training', [True, False])
def test_original_untouched(training):
    m = net(dropout=True).train(training)
    before = copy.deepcopy(m.state_dict())
    got = reestimate_bn(m, images(32).split(8))
    assert all(v.equal(before[k]) for k,v in m.state_dict().items())
    assert m.training==m[1].training==training and not any(o.training for o in got.modules())
    assert m[1].momentum==got[1].momentum==.1 and m[4].momentum==got[4].momentum==.3
    same = {k for k,v in got.state_dict().items() if v.equal(before[k])}
    assert same=={k for k in before if 'running' not in k and 'batches' not in k}

@pytest.mark.parametrize('m,batches,words', [
    (nn.Linear(2, 2), [torch.ones(4, 2)], 'Linear has no BatchNorm'),
    (nn.BatchNorm1d(2, track_running_stats=False), [torch.ones(4, 2)], 'no BatchNorm with running'),
    (net(), [], 'batches is empty'),
    (net(), [images(4), images(1)], 'batch 1 holds 1 input.*2 or more'),
    (net(), [images(4)*float('nan')], '1 got statistics that are NaN')],
    ids='none untracked empty single nan'.split())
def test_repair_refuses(m, batches, words):
    with pytest.raises(ValueError, match=words): reestimate_bn(m, batches)

# --- repair_channels and variance_ratio

def plain(seed, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 12, 3, bias=bias), nn.ReLU(), nn.Conv2d(12, 10, 3),
            nn.ReLU(), nn.Flatten(), nn.Linear(160, 9), nn.ReLU(), nn.Linear(9, 4)).eval()

def resnet(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return reestimate_bn(torchvision.models.resnet18(num_classes=4), [images(64, 32)])

def mean_of(*models):
    res,states = copy.deepcopy(models[0]),[m.state_dict() for m in models]
    res.load_state_dict({k: sum(s[k] for s in states)/len(states) if v.is_floating_point() else v
        for k,v in states[0].items()})
    return res

@torch.no_grad()
def outputs(m, x):
    "`{name: (channels, values)}` of every module"
    res,m = {},copy.deepcopy(m).eval()
    def keep(k): return lambda o, a, y: res.update({k: y.movedim(1, 0).flatten(1).clone()})
    for k,o in m.named_modules(): o.register_forward_hook(keep(k))
    m(x)
    return res

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('n', [2, 3])
def test_repair_channels_reaches_its_goal(seed, bias, n):
    "One batch: exactly the mean of the experts' means and deviations, layer by layer"
    experts,x = [plain(10*seed+i, bias) for i in range(n)],images(64)
    got = repair_channels(mean_of(*experts), experts, [x])
    theirs,own = [outputs(o, x) for o in experts],outputs(got, x)
    for k in '0','2','5':
        mean,std = (sum(f(o[k], 1) for o in theirs)/n for f in (torch.mean, torch.std))
        assert torch.allclose(own[k].mean(1), mean, atol=1e-4)
        assert torch.allclose(own[k].std(1), std, rtol=1e-3)
    assert got[7].weight.equal(mean_of(*experts)[7].weight) # the last stays

@pytest.mark.parametrize('seed', range(4))
def test_variance_ratio(seed):
    experts,x = [plain(2*seed), plain(2*seed+1)],images(96)
    merged = mean_of(*experts)
    t = variance_ratio(merged, experts, [*x.split(32)])
    assert t.index.tolist()==['0','2'] and t.channels.tolist()==[12, 10] and (t.ratio<.7).all()
    own,theirs = outputs(merged, x),[outputs(o, x) for o in experts]
    for k in t.index:
        want = sum(o[k].var(1, correction=0).mean() for o in theirs)/2
        assert t.experts[k]==pytest.approx(want.item(), rel=1e-4)
        assert t.merged[k]==pytest.approx(own[k].var(1, correction=0).mean().item(), rel=1e-4)
    fixed = repair_channels(merged, experts, [*x.split(32)])
    ratio = variance_ratio(fixed, experts, [*x.split(32)]).ratio
    assert ratio.tolist() == pytest.approx([1, 1], abs=.1)
    assert variance_ratio(experts[0], experts[:1], [x]).ratio.tolist() == pytest.approx([1, 1])

def test_repair_resnet():
    "Twenty convolutions, each followed by a BatchNorm, some with a scale of 0"
    experts,batches = [resnet(0), resnet(1)],[images(64, 32)]
    merged = mean_of(*experts)
    nn.init.zeros_(merged.layer1[0].bn2.weight)
    got = repair_channels(merged, experts, batches)
    before,after = (variance_ratio(o, experts, batches).ratio for o in (merged, got))
    assert len(after)==20 and before.median()<.7 and ((after-1).abs()<.1).all()
    assert set(got.state_dict())==set(merged.state_dict())
    old = merged.state_dict()
    changed = {k for k,v in got.state_dict().items() if not v.equal(old[k]) and 'num' not in k}
    assert changed=={f'{k}.{o}' for k in bn_layers(merged)
        for o in ('weight','bias','running_mean','running_var')}

def test_repair_experts_alone():
    "A model merged of copies of itself stays what it is"
    m,x = plain(0),images(64)
    got = repair_channels(m, [m, m], [x])
    assert torch.allclose(got(x), m(x), atol=1e-4)

def test_repair_chosen_layers():
    experts = [plain(0), plain(1)]
    merged = mean_of(*experts)
    got = repair_channels(merged, experts, [images(64)], layers=['2','7'])
    assert {k for k,v in got.state_dict().items() if not v.equal(merged.state_dict()[k])}=={
        '2.weight','2.bias','7.weight','7.bias'}

@pytest.mark.parametrize('training', [True, False])
def test_repair_leaves_all_as_it_was(training):
    models = [net(i).train(training) for i in range(3)]
    before = [copy.deepcopy(m.state_dict()) for m in models]
    got = repair_channels(models[0], models[1:], [*images(32).split(16)], ['0','3'])
    variance_ratio(models[0], models[1:], [images(32)])
    for m,old in zip(models, before):
        assert all(v.equal(old[k]) for k,v in m.state_dict().items())
        assert all(o.training==training and not o._forward_hooks for o in m.modules())
    assert got[1].momentum==.1 and got[4].momentum==.3
    assert not any(o.training or o._forward_hooks for o in got.modules())

def test_repair_dead_channels():
    "Channels without variance, in the merge or in the experts, give finite weights"
    experts,x = [plain(0), plain(1)],images(64)
    for o in experts: nn.init.zeros_(o[0].weight[0])
    merged = mean_of(*experts)
    nn.init.zeros_(merged[0].weight[1:3])
    got = repair_channels(merged, experts, [x])
    assert all(v.isfinite().all() for v in got.state_dict().values())
    assert not got[0].weight[0].any()

def loop():
    c = nn.Conv2d(3, 3, 1)
    return nn.Sequential(c, nn.ReLU(), c, nn.Flatten(), nn.Linear(192, 2))

@pytest.mark.parametrize('f', [repair_channels, variance_ratio])
@pytest.mark.parametrize('m,experts,batches,words', [
    (plain(0), [plain(1)], (o for o in [images(4)]), 'batches is a generator.*list'),
    (plain(0), [plain(1)], images(4), 'batches is a Tensor.*list'),
    (plain(0), [plain(1)], [], 'batches is empty'),
    (plain(0), [plain(1)], [images(4), images(1)], 'batch 1 holds 1 input'),
    (plain(0), [plain(1)], [images(4)*float('nan')], '0 got statistics that are NaN'),
    (plain(0), [], [images(4)], 'experts is empty'),
    (plain(0), [nn.Conv2d(3, 4, 3)], [images(4)], 'an expert has no layer 0.*architecture'),
    (plain(0), [nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 10, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(160, 9))], [images(4)], '0 has 7 and 12 channels'),
    (loop(), [loop()], [images(4)], '0 runs twice'),
    (nn.ReLU(), [nn.ReLU()], [images(4)], 'ReLU runs no Conv2d|no layer to repair')],
    ids='generator tensor empty single nan alone lost channels twice none'.split())
def test_channels_refuses(f, m, experts, batches, words):
    with pytest.raises(ValueError, match=words): f(m, experts, batches)

def test_repair_refuses_layers():
    with pytest.raises(ValueError, match='layers names 1, 9.*choose from 0, 2, 5, 7'):
        repair_channels(plain(0), [plain(1)], [images(4)], ['1','2','9'])
    bare = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2, affine=False), nn.Flatten(),
        nn.Linear(72, 2))
    with pytest.raises(ValueError, match='1, behind 0, has no weight'):
        repair_channels(bare, [bare], [images(4)])

# --- evaluate

@pytest.mark.parametrize('correct,n', [(0,10), (10,10), (137,200), (1,1), (9999,10000)])
@pytest.mark.parametrize('level', [.9, .95, .99])
def test_wilson(correct, n, level):
    p,z = correct/n,norm.ppf((1+level)/2)
    mid,half = (p+z*z/2/n)/(1+z*z/n),z*sqrt(p*(1-p)/n+z*z/4/n/n)/(1+z*z/n)
    assert wilson(correct, n, level) == pytest.approx((mid-half, mid+half), abs=1e-9)

def test_wilson_of_the_paper():
    "science.md, fact 7: .685 of 200 sentences"
    assert wilson(137, 200) == pytest.approx((.618, .745), abs=5e-4)

@pytest.mark.parametrize('correct,n', [(-1,10), (11,10), (0,0)])
def test_wilson_refuses(correct, n):
    with pytest.raises(ValueError, match=f'{correct} correct out of {n}'): wilson(correct, n)

def test_score():
    labels,preds = [0,0,0,1,1,2],[0,0,1,1,0,2]
    f1 = [2*2/(2*2+1+1), 2*1/(2*1+1+1), 1] # 2·TP/(2·TP+FP+FN)
    lo,hi = wilson(4, 6)
    want = dict(accuracy=4/6, lo=lo, hi=hi, macro_f1=pytest.approx(sum(f1)/3),
        mcc=pytest.approx(10/22), n=6) # MCC: (4·6−14)/√(22·22)
    assert score(preds, labels) == want
    assert score(torch.tensor(preds), torch.tensor(labels)) == score(preds, labels)

def test_score_counts_classes_that_exist():
    "A class that is only predicted has no F1 of its own"
    assert score([0,2,1,1], [0,0,1,1])['macro_f1'] == pytest.approx((2/3+1)/2)

def test_score_of_random_classes():
    rng = np.random.default_rng(0)
    labels,preds = rng.integers(0, 5, (2, 300))
    s = score(preds, labels)
    assert s['lo'] < s['accuracy']==(labels==preds).mean() < s['hi']
    assert s['macro_f1'] == pytest.approx(f1_score(labels, preds, average='macro'))

@pytest.mark.parametrize('preds', [[0,1], [0,1,1,0], [[0,1,1]], 0])
def test_score_refuses(preds):
    with pytest.raises(ValueError, match=r'labels \(3,\).*one class per'): score(preds, [0,1,1])

def test_majority(): assert majority([3,1,3,0], 4).tolist()==[3]*4

def test_rows():
    labels = dict(x=np.array([0,1,1,1]), y=np.array([0,0,1,1]))
    rows = score_rows(dict(x=labels['x'], y=1-labels['y']), labels, method='m', threshold=None)
    assert [(r['task'], r['method'], r['accuracy']) for r in rows]==[('x','m',1), ('y','m',0)]
    with pytest.raises(ValueError, match='same tasks'): score_rows(dict(y=0, x=0), labels)

def test_summarise():
    "Mean and minimum of accuracies over the experts', a method without a threshold included"
    made = [('winner',3.,.8,.45), ('average',None,.4,.9), ('winner',15.,.2,.9)]
    rows = pd.DataFrame([dict(method=m, threshold=t, task=k, accuracy=a)
        for m,t,*accs in made for k,a in zip('xy', accs)])
    s = summarise(normalise(rows, dict(x=.8, y=.9)), ['method','threshold'])
    numbers = ['x','y','mean_normalised','worst_normalised']
    assert s.columns.tolist()==['method','threshold',*numbers] and len(s)==3
    for (m,t,*accs),want in zip(made, [[.75,.5], [.75,.5], [.625,.25]]):
        row = s[(s.method==m) & (s.threshold.isna() if t is None else s.threshold==t)]
        assert row[numbers].squeeze().tolist() == pytest.approx([*accs, *want])

@pytest.mark.parametrize('metric', metrics)
@pytest.mark.parametrize('k', [2, 6])
def test_bootstrap_is_what_resampling_items_gives(metric, k):
    "Counts drawn anew against items drawn anew, for a score and for a paired difference"
    rng = np.random.default_rng(k)
    y = rng.choice(k, 400, p=np.arange(1, k+1)/np.arange(1, k+1).sum())
    a,b = (np.where(rng.random(400)<p, y, rng.integers(0, k, 400)) for p in (.7, .6))
    def f(ix, p): return score(p[ix], y[ix])[metric]
    ixs = rng.integers(0, 400, (200, 400))
    for other,naive in ((None, [f(i, a) for i in ixs]), (b, [f(i, a)-f(i, b) for i in ixs])):
        value,lo,hi = bootstrap(a, y, other, metric)
        whole = np.arange(400)
        assert np.isclose(value, f(whole, a)-(0 if other is None else f(whole, b)))
        assert np.allclose([lo, hi], np.quantile(naive, [.025, .975]), atol=.2*(hi-lo))

def test_bootstrap_errors_and_edges():
    with pytest.raises(ValueError, match="metric is 'f1'"): bootstrap([0], [0], metric='f1')
    with pytest.raises(ValueError, match='one class per item'): bootstrap([0, 1], [0])
    with pytest.raises(ValueError, match='one class per item'): bootstrap([], [])
    assert bootstrap([1]*9, [1]*9)==(0., 0., 0.) # one class: no correlation to speak of
    assert bootstrap([1]*9, [1]*9, metric='accuracy')==(1., 1., 1.)
    x = np.array([0, 1]*20)
    assert bootstrap(x, x, x)==(0., 0., 0.)

# --- distil

class Bag(nn.Module):
    "Mean of a text's words, 0 being none, under a body and a head"
    def __init__(self, seed, classes):
        super().__init__()
        torch.manual_seed(seed)
        self.words,self.body,self.classifier = nn.Embedding(30, 8),nn.Linear(8, 8),nn.Linear(8, classes)
    def forward(self, x):
        n = (x>0)[...,None].float()
        return self.classifier(torch.tanh(self.body((self.words(x)*n).sum(1)/n.sum(1))))

@pytest.mark.parametrize('told', (True, False))
def test_distil_fits_heads_of_masked_tensors(told):
    "Batches of tensors of different length, as the laboratory has them: heads are fitted where masks come with them; where they cannot be, that is said"
    from spectrum_merging.distil import distil_answers
    from spectrum_merging.match import match_heads
    with torch.random.fork_rng():
        experts = dict(a=Bag(0, 3), b=Bag(1, 4))
        merged = {t: copy.deepcopy(o) for t,o in experts.items()}
        for t in merged:
            for k in ('words','body'): getattr(merged[t], k).load_state_dict(getattr(experts['a'], k).state_dict())
        torch.manual_seed(3)
        batches = {t: [torch.randint(1, 30, (32, n)) for n in (4, 6, 5, 7, 6)] for t in experts}
    masks = {t: [x>0 for x in o] for t,o in batches.items()}
    if not told:
        with pytest.warns(UserWarning, match='heads are trained from what they are'): distil_answers(merged, experts, batches, epochs=1, lr=1e-12)
        return
    found = distil_answers(merged, experts, batches, epochs=1, lr=1e-12, masks=masks)
    # every fifth part is set aside
    want = match_heads(merged, experts, {t: o[:4] for t,o in batches.items()}, masks={t: o[:4] for t,o in masks.items()})
    for t in experts:
        assert torch.allclose(found[t].classifier.weight, want[t].classifier.weight, atol=1e-6)
    assert not torch.allclose(found['b'].classifier.weight, merged['b'].classifier.weight, atol=1e-2)
