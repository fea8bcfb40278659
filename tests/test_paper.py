'`protocol="paper"` equals, bit for bit, the formulas of science.md in plain numpy and torch.'
import numpy as np, pytest, torch
from spectrum_merging.merge import merge
from spectrum_merging.plan import make_plan
from spectrum_merging.rules import rules
from spectrum_merging.scan import scan
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import BertConfig, BertForSequenceClassification

all_seven = 'standard','base_reset','snr_winner','snr_lowA','snr_lowB','snr_max','snr_weighted'

# --- the paper, from science.md §1

def vision_snr(W):
    W = W.double().numpy().reshape(len(W), -1)
    e = np.linalg.eigvalsh(W@W.T/W.shape[1])
    return e.max()/(np.median(e)+1e-8)

def nlp_snr(W):
    if W.ndim < 2: return 0.
    W = W.double().numpy()
    N,M = W.shape
    e = np.maximum(np.linalg.eigvalsh(W.T@W/min(N, M)), 1e-9)
    edge = np.var(W)*(1+np.sqrt(min(N, M)/max(N, M)))**2
    return e[e>edge].sum()/(e[e<=edge].sum()+1e-9)

def vision_snrs(sd): return {k: vision_snr(v) for k,v in sd.items() if 'weight' in k and v.ndim>=2}
def nlp_snrs(sd): return {k: nlp_snr(v) for k,v in sd.items() if 'layer' in k and 'weight' in k}

def rule(strategy, hi, sa, sb, A, B, base):
    "One decided tensor"
    mean,loud = 0.5*A + 0.5*B, A if sa>sb else B
    alpha = sa/(sa+sb+1e-8)
    above,below = dict(standard=(mean, mean), base_reset=(mean, base), snr_winner=(loud, mean),
        snr_lowA=(mean, A), snr_lowB=(mean, B), snr_max=(mean, loud),
        snr_weighted=(alpha*A + (1-alpha)*B, mean))[strategy]
    return above if hi else below

def paper(strategy, a, b, base, snr_a, snr_b, cut):
    "Merged state dict, loaded into tensors of model A's dtypes"
    res = {}
    for k in a:
        new = 0.5*a[k] + 0.5*b[k]
        if k in snr_a:
            sa,sb = snr_a[k],snr_b[k]
            new = rule(strategy, max(sa, sb)>cut, sa, sb, a[k], b[k], base[k])
        res[k] = torch.empty_like(a[k]).copy_(new)
    return res

# --- experts that look trained

def tune(sd, seed, strength):
    "Like `sd` with noise and some low rank in each matrix, other vectors, statistics and counts"
    g = torch.Generator().manual_seed(seed)
    res = {}
    for i,(k,v) in enumerate(sd.items()):
        r = torch.randn(v.shape, generator=g)
        if not v.is_floating_point(): res[k] = torch.tensor(100*seed+(7+seed)*i%13)
        elif k.endswith('running_var'): res[k] = v*r.exp()
        elif v.ndim < 2: res[k] = v+.1*r
        else:
            left,right = (torch.randn(n, 2, generator=g) for n in (len(v), v[0].numel()))
            low = (left@right.T).view(v.shape)/(len(left)+len(right))**.5
            res[k] = v+v.std()*(.2*r+strength*(.2+torch.rand((), generator=g))*low)
    return res

def experts(model, seed, strength):
    base = {k: v.clone() for k,v in model.state_dict().items()}
    return base,*(tune(base, 2*seed+i, strength) for i in (1, 2))

def check(strategy, a, b, base, ours, theirs, cut, **kw):
    how = kw if rules[strategy].asks('snr') else {}
    plan = make_plan(strategy, [a, b], base, protocol='paper', scans=dict(zip('ab', ours)), **how)
    got,want = merge(plan, [a, b], base),paper(strategy, a, b, base, *theirs, cut)
    assert list(got)==list(want)
    assert {k: v.dtype for k,v in got.items()}=={k: v.dtype for k,v in want.items()}
    assert [k for k in want if not torch.equal(got[k], want[k])] == []

def measured(a, b, estimator, plain):
    "Both experts' SNRs, by the library and by the formulas above"
    return [scan(o, estimator=estimator, progress=False) for o in (a, b)],[plain(o) for o in (a, b)]

# --- images: absolute thresholds

@pytest.fixture(scope='module', params=[1, 2])
def images(request):
    with torch.random.fork_rng():
        torch.manual_seed(request.param)
        base,a,b = experts(ResNet(BasicBlock, [1,1,1,1], num_classes=10), request.param, 4.)
    return base,a,b,*measured(a, b, 'paper_vision', vision_snrs)

def test_images_are_odd(images):
    "Half a batch to cut off in some counts; both experts win some layers"
    _,a,b,_,(sa,sb) = images
    halves = {(a[k]+b[k]).item()%2 for k in a if k.endswith('num_batches_tracked')}
    assert halves=={0, 1} and {sa[k]>sb[k] for k in sa}=={True, False}

@pytest.mark.parametrize('threshold', [3, 5, 15, 25])
@pytest.mark.parametrize('strategy', all_seven)
def test_images(images, strategy, threshold):
    base,a,b,ours,theirs = images
    hi = [max(theirs[0][k], theirs[1][k])>threshold for k in theirs[0]]
    assert 0 < sum(hi) < len(hi)
    check(strategy, a, b, base, ours, theirs, threshold, estimator='paper_vision',
        threshold=threshold)

@pytest.mark.parametrize('top', [25, 100])
def test_images_top(images, top):
    base,a,b,ours,theirs = images
    cut = np.percentile([max(theirs[0][k], theirs[1][k]) for k in theirs[0]], 100-top)
    check('snr_max', a, b, base, ours, theirs, cut, estimator='paper_vision', top=top)

@pytest.mark.parametrize('strategy', all_seven)
def test_one_row_or_column(strategy):
    "One channel in, one class out: ≥ 2 dimensions, so decided like any other weight"
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(8, 1))
    base,a,b = experts(net, 3, 4.)
    ours,theirs = measured(a, b, 'paper_vision', vision_snrs)
    for threshold in (.5, 1e4):
        check(strategy, a, b, base, ours, theirs, threshold, estimator='paper_vision',
            threshold=threshold)

# --- text: the loudest 25, 50, 70 %

def bert(layers=4):
    cfg = BertConfig(hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=64, vocab_size=50, max_position_embeddings=16, num_labels=2)
    return BertForSequenceClassification(cfg)

@pytest.fixture(scope='module', params=[1, 2])
def text(request):
    with torch.random.fork_rng():
        torch.manual_seed(request.param)
        base,a,b = experts(bert(), request.param, 8.)
    return base,a,b,*measured(a, b, 'paper_nlp', nlp_snrs)

@pytest.mark.parametrize('top', [25, 50, 70, 100])
@pytest.mark.parametrize('strategy', all_seven)
def test_text(text, strategy, top):
    base,a,b,ours,theirs = text
    peak = [max(theirs[0][k], theirs[1][k]) for k in theirs[0]]
    cut = np.percentile(peak, 100-top)
    assert len(peak)==32 and sum(o==0 for o in peak)==8 # LayerNorm weights count, with SNR 0
    assert sum(o>cut for o in peak) == {25:8, 50:16, 70:22, 100:24}[top]
    assert {theirs[0][k]>theirs[1][k] for k in theirs[0] if theirs[0][k]}=={True, False}
    check(strategy, a, b, base, ours, theirs, cut, estimator='paper_nlp', top=top)

def test_decided_names(text):
    "As fact 1 says: names with `layer` and `weight`, embeddings, pooler and head left out"
    base,a,b,ours,theirs = text
    plan = make_plan('snr_winner', [a, b], estimator='paper_nlp', protocol='paper',
        scans=dict(zip('ab', ours)))
    decided = plan.table.dropna(subset='snr_a')
    assert set(decided.name)==set(theirs[0]) and plan.meta['of']=='weights'
    assert decided.snr_a.tolist() == pytest.approx(list(theirs[0].values()), rel=1e-9)

def test_bert_has_96_entries():
    "Fact 2: 96 decided names, of which exactly 24 are feed-forward matrices"
    names = nlp_snrs({k: torch.zeros(1) for k in bert(12).state_dict()})
    parts = [k.partition('layer.')[2].partition('.')[2] for k in names]
    assert len(parts)==96
    assert sum(k in ('intermediate.dense.weight', 'output.dense.weight') for k in parts)==24

def test_measured_by_itself(text):
    "Without scans: the weights, though a base is there"
    base,a,b,ours,_ = text
    kw = dict(base=base, estimator='paper_nlp', protocol='paper', top=50)
    given = make_plan('base_reset', [a, b], scans=dict(zip('ab', ours)), **kw)
    assert make_plan('base_reset', [a, b], **kw).digest==given.digest
