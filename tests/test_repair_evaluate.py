"BatchNorm statistics measured again equal direct ones, and scores equal their formulas."
import copy, numpy as np, pandas as pd, pytest, torch
from math import sqrt
from scipy.stats import norm
from sklearn.metrics import f1_score
from spectrum_merging.evaluate import majority, normalise, score, score_rows, summarise, wilson
from spectrum_merging.repair import bn_layers, reestimate_bn
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

def images(n): return 2*torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))+.5

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
    want = dict(accuracy=4/6, lo=lo, hi=hi, macro_f1=pytest.approx(sum(f1)/3), n=6)
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
