"Plans meet wrong input first, decide units whole, are exact on disk, and merge to the bit."
import copy, csv, json, numpy as np, pandas as pd, pytest, torch
from collections import namedtuple
from functools import lru_cache
from hypothesis import given, settings, strategies as st
from io import StringIO
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spectrum_merging.merge import load_task, merge, task_state
from spectrum_merging.plan import Plan, make_plan
from spectrum_merging.preflight import PreflightError
from spectrum_merging.rules import rules
from spectrum_merging.scan import scan
from torch import nn

frugal = settings(max_examples=30, deadline=None, derandomize=True, database=None)
strategies = [k for k,o in rules.items() if o.kind=='layer' and not o.adds] # the paper's seven
two_only = [k for k in strategies if rules[k].two_only]
two_or_three = [(n, k) for k in strategies for n in ((2,) if k in two_only else (2, 3))]

def useful(strategy, **options):
    "Those options that a strategy has a use for"
    return options if rules[strategy].asks('snr') else {}

def seq(**mods):
    m = nn.Sequential()
    for k,o in mods.items(): m.add_module(k, o)
    return m

@lru_cache
def expert(seed, classes=2, width=16, head='fc'):
    "A network near the base (seed 0): low-rank updates of random strength, statistics of its own"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        m = seq(conv1=nn.Conv2d(3, width, 3), bn1=nn.BatchNorm2d(width),
            conv2=nn.Conv2d(width, 24, 3, bias=False), bn2=nn.BatchNorm2d(24),
            conv3=nn.Conv2d(24, 24, 3))
        torch.manual_seed(seed)
        m.add_module(head, nn.Linear(24, classes))
        for v in m.requires_grad_(False).state_dict().values() if seed else ():
            if v.ndim > 1:
                low = torch.outer(torch.randn(len(v)), torch.randn(v[0].numel())).view_as(v)
                v += .02*torch.randn_like(v)+.1*torch.rand(())*low
            elif v.is_floating_point(): v += .1*torch.rand_like(v)
            else: v += seed
    return m

def models(n=2, **kw): return {f't{i}': expert(i, classes=1+i, **kw) for i in range(1, n+1)}
def state(m): return m if isinstance(m, dict) else m.state_dict()
def without(m, name): return {k: v for k,v in state(m).items() if k!=name}
def plus(m, **new): return state(m)|new
def changed(m, name, f): return plus(m, **{name: f(state(m)[name].clone())})
def put(value): return lambda t: t.flatten().index_fill(0, torch.tensor(1), value).view_as(t)
def coefs(plan): return plan.table.set_index('name')[['base']+plan.models]

def same(got, want):
    if list(got)!=list(want): return False
    return all(got[k].dtype==v.dtype and got[k].equal(v) for k,v in want.items())

# --- wrong input

A,B,C = (expert(i) for i in (1, 2, 3))
wide,odd,other = expert(2, width=20),expert(2, classes=3),seq(l1=nn.Linear(3, 3))
ids = torch.arange(4)
nan,inf = float('nan'),float('inf')

def quick_scans(*names, **made):
    df = pd.DataFrame(dict(name=['conv1.weight'], snr=[1.], estimator='flip', of='weights') | made)
    return dict(scans=dict.fromkeys(names, df))

def wrong(ms, words, id, **kw): return pytest.param(ms, kw, words, id=id)

@pytest.mark.parametrize('ms,kw,words', [
    # models that do not fit
    wrong([other, A], ['l1.weight: in a, not in b', 'conv1.weight: in b, not in a',
        'one architecture'], 'architecture'),
    wrong([A, plus(B, x=ids*1.)], ['1 problem)', 'x: in b, not in a', 'one architecture'], 'extra'),
    wrong([A, without(B, 'bn2.bias')], ['1 problem)', 'bn2.bias: in a, not in b'], 'lost'),
    wrong([A, wide], ['conv1.weight: shape (16, 3, 3, 3) in a, (20, 3, 3, 3) in b', 'bn1.bias',
        'heads=[...]'], 'shape'),
    wrong([A, plus(without(B, 'conv2.weight'), **{'bn1.bias': ids*1.})], ['2 problems',
        'conv2.weight: in a', 'bn1.bias: shape (16,)'], 'all at once'),
    wrong([A, odd, without(C, 'fc.bias')], ['fc.bias: in a, not in c'], 'third lacks head'),
    wrong([A, wide, without(C, 'conv1.bias')], ['conv1.bias: in a, not in c'], 'third lacks body'),
    wrong([A, changed(B, 'conv2.weight', lambda t: t.to(torch.int8))],
        ['conv2.weight', 'dtype float32 in a, int8 in b', 'convert'], 'dtype'),
    # the base
    wrong([A, B], ["'base_reset'", 'base='], 'no base', strategy='base_reset'),
    wrong([A, B], ['conv1.weight: in a, not in base', 'one base'], 'other base',
        strategy='base_reset', base=other),
    wrong([A, B], ['conv1.weight: shape (16, 3, 3, 3) in a, (20, 3, 3, 3) in base'], 'wide base',
        strategy='base_reset', base=wide),
    wrong([A, B], ['conv1.weight: shape (16, 3, 3, 3) in a, (20, 3, 3, 3) in base'], 'wide update',
        base=wide),
    wrong([A, B], ["of='update'", 'base=', "of='weights'"], 'update of nothing', of='update'),
    # cuts
    wrong([A, B], ['threshold=3', 'top=50', 'choose one'], 'both', threshold=3, top=50),
    wrong([A, B], ['threshold=0', 'top=50', 'choose one'], 'both zero', threshold=0, top=50),
    wrong([A, B], ['top is 0', '%', 'up to 100'], 'top 0', top=0),
    wrong([A, B], ['top is 101', '%', 'up to 100'], 'top 101', top=101),
    wrong([A, B], ['top is nan', '%', 'up to 100'], 'top nan', top=nan),
    wrong([A, B], ['threshold is nan', 'finite'], 'threshold nan', threshold=nan),
    wrong([A, B], ['threshold is inf', 'finite'], 'threshold inf', threshold=inf),
    # names of choices
    wrong([A, B], ["'tees'", *map(repr, strategies)], 'strategy', strategy='tees'),
    # options that do nothing
    wrong([A, B], ["'standard'", "no use for 'top'"], 'top of nothing', strategy='standard', top=50),
    wrong([A, B], ["'standard'", "no use for 'threshold'"], 'threshold of nothing', strategy='standard', threshold=3),
    wrong([A, B], ["'standard'", "no use for 'estimator'"], 'estimator of nothing', strategy='standard',
        estimator='mp'),
    wrong([A, B], ["'standard'", "no use for 'of'"], 'of of nothing', strategy='standard', of='weights'),
    wrong([A, B], ["'snr_winner'", "no use for 'scale'"], 'scale of nothing', scale=.5),
    wrong([A, B], ["'tsv_m'", "no use for 'top'"], 'top of an operation', strategy='tsv_m', base=C, top=50),
    wrong([A, B], ["'lines'", "no use for 'protocol'"], 'paper updates', strategy='lines', base=C, protocol='paper'),
    wrong([A, B], ["'iqr'", "'mp', 'paper_nlp', 'paper_vision', 'spectrum', 'flip'"], 'estimator',
        estimator='iqr'),
    wrong([A, B], ["'layer'", "'unit' or 'paper'"], 'protocol', protocol='layer'),
    wrong([A, B], ["'gradient'", "'weights' or 'update'"], 'of', of='gradient'),
    # how many
    wrong([A, B, C], ["'snr_lowA'", '2 models, not 3', "'snr_max'"], 'lowA', strategy='snr_lowA'),
    wrong([A, B, C], ["'snr_lowB'", '2 models, not 3', "'snr_max'"], 'lowB', strategy='snr_lowB'),
    wrong([A, B, C], ["'paper'", '2 models, not 3', "'unit'"], 'paper of three', protocol='paper'),
    wrong([A], ['1 model', '2 or more'], 'one'),
    wrong([], ['0 model', '2 or more'], 'none'),
    wrong('folder/of/one', ["'folder/of/one'", 'list'], 'a path'),
    # heads
    wrong([A, B], ["'paper'", "['fc']", "'unit'"], 'paper heads', protocol='paper', heads=['fc']),
    wrong([A, odd], ['fc.weight: shape (2, 24) in a, (3, 24) in b'], 'paper shapes',
        protocol='paper'),
    wrong([A, odd], ['fc.weight: shape (2, 24) in a, (3, 24) in b', 'heads='], 'merged', heads=[]),
    wrong([A, B], ["'classifer'"], 'no such head', heads=['classifer']),
    wrong([A, B], ["'fc'"], 'head as text', heads='fc'),
    wrong([A, B], ['every tensor', 'heads='], 'all heads',
        heads=['conv1','bn1','conv2','bn2','conv3','fc']),
    # names of models
    wrong(dict(base=A, b=B), ["'base'", 'reason'], 'base'),
    wrong(dict(reason=A, b=B), ["'reason'", 'plain words'], 'reason'),
    wrong(dict(snr_a=A, b=B), ["'snr_a'", 'plain words'], 'snr_'),
    wrong({'a@b': A, 'b': B}, ["'a@b'", 'without @'], '@'),
    wrong({' ': A, 'b': B}, ["' '", 'plain words'], 'blank'),
    wrong({0: A, 1: B}, ['name 0', 'plain words'], 'number'),
    wrong({'a/b': A, 'c': B}, ["'a/b'", 'plain words'], 'slash'),
    # scans
    wrong([A, B], ["['x', 'b']", "['a', 'b']"], 'scans of others', **quick_scans('x', 'b')),
    wrong([A, B], ['scan of a', "'spectrum'", "'flip'"], 'other estimator',
        **quick_scans('a', 'b', estimator='spectrum')),
    wrong([A, B], ['scan of a', "'update'", "'weights'"], 'scans of updates',
        **quick_scans('a', 'b', of='update')),
    wrong([A, B], ['scan of a', "'of'", 'assign('], 'scans of unknown', scans={k: pd.DataFrame(dict(name=['conv1.weight'],
        snr=[1.], estimator='flip')) for k in 'ab'}),
    wrong([A, B], ['scan of a', "'update'", "'weights'"], 'scans mixed', scans={k: pd.DataFrame(dict(
        name=['conv1.weight', 'conv2.weight'], snr=1., estimator='flip', of=['weights', 'update'])) for k in 'ab'})])
def test_wrong_input(ms, kw, words, monkeypatch):
    "The message names the thing, the values and the remedy, and nothing was measured"
    def measure(*a, **k): pytest.fail('measured before it was checked')
    monkeypatch.setattr('spectrum_merging.scan.scan', measure)
    with pytest.raises((ValueError, TypeError)) as e:
        make_plan(**dict(strategy='snr_winner') | kw, models=ms)
    assert [o for o in words if o not in str(e.value)] == []

@pytest.mark.parametrize('ms,kw,words', [
    wrong([A, changed(B, 'conv2.weight', put(nan))],
        ['conv2.weight', 'b', '1 NaN and 0 Inf', '3456', 'repair'], 'nan'),
    wrong([changed(A, 'conv1.bias', put(-inf)), B],
        ['conv1.bias of a', '0 NaN and 1 Inf', '16', 'repair'], 'inf'),
    wrong([A, changed(B, 'fc.weight', put(nan))], ['fc.weight', 'b', '1 NaN'], 'nan in head'),
    wrong([A, changed(B, 'bn1.running_var', put(nan))], ['bn1.running_var of b', '1 NaN'],
        'nan in statistics', strategy='standard'),
    wrong([A, B], ['bn2.bias of base', '1 NaN', 'repair'], 'nan in base',
        strategy='base_reset', base=changed(A, 'bn2.bias', put(nan)), threshold=1e9),
    wrong([A, B], ['base conv1.weight', '1 Inf', 'repair'], 'inf in update',
        base=changed(A, 'conv1.weight', put(inf))),
    wrong([plus(A, ids=ids), plus(B, ids=ids+1)], ['ids', 'int64', 'a and b', 'align'], 'ints')])
def test_wrong_values(ms, kw, words, tmp_path):
    "Values are looked at where they are read: by the scan or by the merge, which leaves nothing"
    kw = dict(strategy='snr_winner') | kw
    for out in (None, tmp_path/'out'):
        with pytest.raises(ValueError) as e:
            merge(make_plan(models=ms, **kw), ms, kw.get('base'), out)
        assert [o for o in words if o not in str(e.value)] == []
    assert not list(tmp_path.iterdir())

def test_too_large_for_its_type():
    "A sum that fp16 cannot hold is an error that names the coefficients, not an Inf in a file"
    ms = [{'w': torch.full((4, 4), v).half()} for v in (6e4, 6e4)]
    table = make_plan('standard', ms).table.assign(b=1.)
    plan = Plan(table, dict(models=['a', 'b']))
    with pytest.raises(ValueError, match='w gets values that float16 cannot hold.*wider dtype'):
        merge(plan, ms)
    assert merge(plan, ms, dtype='float32')['w'].isfinite().all()

def test_all_problems_in_one_table(tmp_path):
    "Of every kind, each with a remedy; the table comes with the error"
    (tmp_path/'full').mkdir()
    (tmp_path/'full/file').touch()
    vocab = lambda n, p='': {f'{p}embeddings.weight': torch.zeros(n, 4), f'{p}l.weight': torch.zeros(4, 4)}
    b = dict(vocab(7), ids=torch.zeros(3)) | {'bn.num_batches_tracked': torch.tensor(1.)}
    a = dict(vocab(5), ids=torch.zeros(3, dtype=torch.int64), lm_head=torch.zeros(5, 4),
        **{'bn.num_batches_tracked': torch.tensor(1)})
    with pytest.raises(PreflightError) as e: make_plan('standard', [a, b], out=tmp_path/'full')
    t = e.value.table.set_index('tensor')
    assert set(t.index)=={'embeddings.weight','ids','lm_head','bn.num_batches_tracked',''}
    words = {'embeddings.weight': 'vocabulary', 'ids': 'floats', 'lm_head': 'tie', '': 'new folder',
        'bn.num_batches_tracked': 'floats'}
    assert [k for k,v in words.items() if v not in t.remedy[k]] == []
    assert [k for k in t.index if k not in str(e.value)] == []
    with pytest.raises(PreflightError, match="prefix 'bert.'"):
        make_plan('standard', [vocab(5, 'bert.'), vocab(5)])

def test_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr('shutil.disk_usage', lambda p: namedtuple('U', 'free')(10))
    with pytest.raises(PreflightError, match='GB are free'): make_plan('standard', [A, B], out=tmp_path/'o')
    with pytest.raises(OSError, match='GB are free'): merge(make_plan('standard', [A, B]), [A, B], out=tmp_path/'o')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('strategy', ['standard', 'snr_winner'])
def test_tied_module_and_its_folder(strategy, tmp_path):
    "The file lacks the name that the module ties: they fit, either way round"
    m = Tied(1)
    save_file({k: v for k,v in state(m).items() if k!='out.weight'}, tmp_path/'m.safetensors')
    for ms in ([m, tmp_path/'m.safetensors'], [tmp_path/'m.safetensors', m]):
        plan = make_plan(strategy, ms)
        merged = merge(plan, ms)
        assert same({k: merged[k] for k in ('embed.weight','body.weight')},
            {k: state(m)[k] for k in ('embed.weight','body.weight')})
        assert ('out.weight' in merged)==(ms[0] is m)

def test_many_problems_are_cut_short():
    more = {f'l{i:02}': nn.Linear(2, 2, bias=False) for i in range(25)}
    with pytest.raises(ValueError, match=r'25 problems(.|\n)*l11(.|\n)*… and 13 more'):
        make_plan('standard', [seq(y=nn.Linear(2, 2), **more), seq(y=nn.Linear(2, 2))])

# --- units

@lru_cache
def scans(n, of):
    base = expert(0, classes=7) if of=='update' else None
    return {k: scan(m, base, of=of, progress=False) for k,m in models(n).items()}

def plans(strategy, n, top=None, of='weights', **kw):
    base = expert(0, classes=7)
    return make_plan(strategy, models(n), base, **useful(strategy, top=top, of=of, scans=scans(n, of)), **kw)

@frugal
@given(st.sampled_from(strategies), st.integers(2, 4), st.floats(1, 100),
    st.sampled_from(['weights','update']))
def test_unit_properties(strategy, n, top, of):
    plan = plans(strategy, 2 if strategy in two_only else n, top, of)
    t,c = plan.table.set_index('name'),coefs(plan)
    head = t.role=='head'
    assert (c[~head].groupby(t.unit[~head]).nunique()==1).all(axis=None)
    assert np.allclose(c.sum(axis=1), 1, rtol=0, atol=1e-12) and ((c>=0) & (c<=1)).all(axis=None)
    heads = [f'fc.{p}@{m}' for p in ('weight','bias') for m in plan.models]
    assert sorted(t.index)==sorted(heads+[k for k in state(A) if k[:2]!='fc'])
    assert all(c.loc[k,m]==(k.partition('@')[2]==m) for k in t.index[head] for m in c)
    assert strategy=='base_reset' or (c.base==0).all()
    assert (t.unit[[f'bn1.{k}' for k in state(A.bn1)]+['conv1.bias']]=='conv1').all()

@pytest.mark.parametrize('of', ['weights','update'])
@pytest.mark.parametrize('n,strategy', [o for o in two_or_three if o[1]!='standard'])
def test_unit_rules(n, strategy, of):
    "The paper's table, unit by unit: above the cut one thing, not above it another"
    snrs = pd.DataFrame({k: s.set_index('name').snr for k,s in scans(n, of).items()})
    snrs = snrs.drop('fc.weight', errors='ignore')
    peak = snrs.max(axis=1).sort_values()
    cut = float(peak.iloc[:2].mean())
    assert len(peak)==3 and peak.iloc[0] < cut < peak.iloc[1]
    plan = make_plan(strategy, models(n), expert(0, classes=7), threshold=cut, of=of)
    def all_of(name): return {m: float(m==name) for m in ['base', *snrs]}
    for k,s in snrs.iterrows():
        mean,share = {'base': 0.} | {m: 1/n for m in snrs},{'base': 0.} | (s/s.sum()).to_dict()
        loud = all_of(s[::-1].idxmax()) # the last of equals, as in `A if SNR_A > SNR_B else B`
        hi,lo = dict(base_reset=(mean, all_of('base')), snr_winner=(loud, mean),
            snr_lowA=(mean, all_of('t1')), snr_lowB=(mean, all_of('t2')), snr_max=(mean, loud),
            snr_weighted=(share, mean))[strategy]
        assert coefs(plan).loc[k].to_dict() == pytest.approx(hi if peak[k]>cut else lo, abs=1e-6)
        shown = plan.table.set_index('name').loc[k, [f'snr_{m}' for m in snrs]]
        assert shown.tolist() == pytest.approx(s.tolist())
    assert plan.meta['threshold']==plan.meta['cut']==cut and plan.meta['of']==of

def test_unit_with_two_matrices():
    "One decision from the mean of their SNRs, weighted by their number of values"
    class Pair(nn.Module):
        def __init__(self, seed):
            super().__init__()
            for k,rows in dict(in_proj=40, out_proj=30).items():
                g = torch.Generator().manual_seed(seed+rows)
                low = torch.outer(torch.randn(rows, generator=g), torch.randn(20, generator=g))
                W = torch.randn(rows, 20, generator=g)+seed*low
                self.register_parameter(k, nn.Parameter(W))
    ms = [seq(attn=Pair(i), fc=nn.Linear(2, 2)) for i in (1, 2)]
    plan = make_plan('snr_winner', ms, top=100)
    s = scan(ms[0], progress=False).set_index('name').snr
    want = (800*s['attn.in_proj']+600*s['attn.out_proj'])/1400
    assert plan.table.snr_a.iloc[:2].tolist() == pytest.approx([want, want])
    assert s['attn.in_proj']!=s['attn.out_proj'] and coefs(plan).iloc[:2].nunique().max()==1

@pytest.mark.parametrize('top,hi', [(1,1), (34,1), (50,1), (None,1), (51,2), (99,2), (100,3)])
def test_top(top, hi):
    "Percentiles of three units, strictly above; at top=100 every unit passes; 50 by default"
    c = coefs(plans('snr_winner', 2, top)).loc[[f'conv{i}.weight' for i in (1, 2, 3)]]
    assert (c.max(axis=1)==1).sum()==hi

def test_defaults():
    "The update where there is a base, the weights where there is none; letters for a list"
    assert make_plan('snr_max', [A, B]).meta['of']=='weights'
    assert make_plan('snr_max', [A, B], expert(0)).meta['of']=='update'
    assert make_plan('standard', [A, B, C]).models==['a','b','c']
    assert len(set(make_plan('standard', [A]*28).models))==28

# --- heads

def heads_of(plan):
    names = plan.table.name[plan.table.role=='head']
    return {k.partition('@')[0].rpartition('.')[0] for k in names}

@pytest.mark.parametrize('base', ['none','fits','other classes','no head'])
@pytest.mark.parametrize('head', ['fc','readout'])
def test_head_of_other_shape(head, base):
    "The one module with other rows is the head, whatever its name, and whatever the base has there"
    ms,far = models(head=head),expert(0, 9, head=head)
    base = {'none': None, 'fits': expert(0, 2, head=head), 'other classes': far,
        'no head': without(far, head+'.weight')}[base]
    plan = make_plan('snr_winner', ms, base)
    merged = merge(plan, ms, base)
    assert heads_of(plan)=={head}
    for k,m in ms.items(): assert task_state(merged, k)[head+'.weight'].equal(m[-1].weight)

@pytest.mark.parametrize('base', ['none','fits','no head'])
def test_head_by_name(base):
    "A head that must be named: same shape in both, unusual name"
    ms,near = [expert(i, head='readout') for i in (1, 2)],expert(0, head='readout')
    base = {'none': None, 'fits': near, 'no head': without(near, 'readout.weight')}[base]
    assert heads_of(make_plan('snr_max', ms))==set()
    assert heads_of(make_plan('snr_max', ms, base, heads=['readout']))=={'readout'}

def test_heads_merged_when_asked():
    plan = make_plan('snr_lowA', [A, B], heads=[], threshold=1e9)
    assert heads_of(plan)==set() and not plan.table.name.str.contains('@').any()
    assert coefs(plan).loc['fc.weight'].tolist()==coefs(plan).loc['fc.bias'].tolist()==[0,1,0]

def test_head_with_norm():
    "A head's statistics are part of the head"
    ms = [seq(conv=nn.Conv2d(3, 8, 3), classifier=nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
        for _ in range(2)]
    ms[1].classifier[1].running_mean += 1
    ms[1].classifier[1].num_batches_tracked += 5
    got,want = task_state(merge(make_plan('standard', ms), ms), 'b'),state(ms[1])
    assert [k for k in want if k.startswith('classifier') and not got[k].equal(want[k])] == []

class Tied(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.embed,self.body = nn.Embedding(20, 12),nn.Linear(12, 12)
        self.out = nn.Linear(12, 20, bias=False)
        g = torch.Generator().manual_seed(seed)
        for p in self.parameters(): nn.init.normal_(p, generator=g)
        self.out.weight = self.embed.weight

@pytest.mark.parametrize('strategy', strategies)
def test_tied_weights(strategy, tmp_path):
    "One decision, equal values, also on disk"
    ms,base = [Tied(1), Tied(2)],Tied(3)
    plan = make_plan(strategy, ms, base, **useful(strategy, top=50, of='weights'))
    assert coefs(plan).loc['embed.weight'].tolist()==coefs(plan).loc['out.weight'].tolist()
    merged = load_task(merge(plan, ms, base, out=tmp_path/'out'))
    assert merged['embed.weight'].equal(merged['out.weight'])

def test_integer_buffers():
    "Ids stay as they are; counters follow their unit and are cut off"
    big,mask = torch.tensor([2**60+1, 5]),torch.tensor([True,False])
    ms = [plus(m, ids=big, mask=mask) for m in (A, B)]
    merged = merge(make_plan('standard', ms), ms)
    assert merged['ids'].equal(big) and merged['mask'].equal(mask)
    assert A.bn1.num_batches_tracked+B.bn1.num_batches_tracked==3
    assert merged['bn1.num_batches_tracked'].equal(torch.tensor(1))
    only = merge(make_plan('snr_lowB', ms, threshold=1e9), ms)
    assert all(only[f'bn1.{k}'].equal(v) for k,v in state(B.bn1).items())

# --- table, digest, files

def table(**cols):
    half = dict(name=['w','v'], unit='u', role='matrix', op='linear', base=0., a=[.3,.5], b=[.7,.5])
    return pd.DataFrame(half | dict(snr_a=1., snr_b=2., reason='r') | cols)

def plan_of(**cols): return Plan(table(**cols), dict(models=['a','b']))

@pytest.mark.parametrize('t,words', [
    (table().drop(columns='b'), "lacks the columns.*'b'"),
    (table().drop(columns='op'), "lacks the columns.*'op'"),
    (table(name='w'), "'w' twice"),
    (table(a=[.5,nan]), "'v'.*no finite number"),
    (table(base=[inf,0]), "'w'.*no finite number"),
    (table(op='sum'), "'sum'.*'linear'")], ids='model column twice nan inf op'.split())
def test_bad_table(t, words):
    with pytest.raises(ValueError, match=words): Plan(t, dict(models=['a','b']))

@pytest.mark.parametrize('cols', [dict(reason='other'), dict(snr_a=9., snr_b=nan), dict(base=0),
    dict(unit='x', role='bias'), dict(base=-0.)], ids=str)
def test_digest_ignores(cols): assert plan_of(**cols).digest==plan_of().digest

@pytest.mark.parametrize('cols', [dict(a=[.3,np.nextafter(.5, 1)]), dict(a=[.7,.5], b=[.3,.5]),
    dict(base=1e-300), dict(name=['w','u']), dict(a=[.3,0])], ids=str)
def test_digest_sees(cols): assert plan_of(**cols).digest!=plan_of().digest

def test_digest_and_names():
    "The order of rows and the settings are no part of it, the models' names are"
    t = plan_of().table
    assert Plan(t[::-1], dict(models=['a','b'], strategy='x')).digest==plan_of().digest
    renamed = t.rename(columns=dict(a='c', snr_a='snr_c'))
    assert Plan(renamed, dict(models=['c','b'])).digest!=plan_of().digest

words = st.text(st.characters(codec='utf-8', exclude_categories=['Cs']), max_size=12)
floats = st.floats(allow_nan=False, allow_infinity=False)

@frugal
@given(st.lists(words, min_size=1, max_size=6, unique=True), st.data())
def test_file_is_exact(tmp_path_factory, names, data):
    "Names with commas and quotes, and every float"
    n = len(names)
    def draw(kind): return data.draw(st.lists(kind, min_size=n, max_size=n))
    model = data.draw(words.filter(lambda o: o.strip() and o not in ('b', *table())))
    t = pd.DataFrame({'name': names, 'unit': draw(words), 'role': draw(words), 'op': 'linear',
        'base': draw(floats), model: draw(floats), 'b': draw(floats), f'snr_{model}': nan,
        'snr_b': draw(floats), 'reason': draw(words)})
    plan = Plan(t, dict(models=[model,'b'], strategy=data.draw(words)))
    again = Plan.load(plan.save(tmp_path_factory.mktemp('plan')/'p.csv'))
    pd.testing.assert_frame_equal(again.table, plan.table, check_exact=True, check_dtype=False)
    assert again.digest==plan.digest and again.meta==plan.meta and again.models==plan.models

@pytest.mark.parametrize('strategy', strategies)
@pytest.mark.parametrize('protocol', ['unit','paper'])
def test_plan_survives_its_file(strategy, protocol, tmp_path):
    ms,base = dict(x=A, y=B),expert(0)
    plan = make_plan(strategy, ms, base, protocol=protocol)
    again = Plan.load(plan.save(tmp_path/'p.csv'))
    assert again.digest==plan.digest and again.meta==json.loads(json.dumps(plan.meta))
    assert again.diff(plan).empty and again.explain('conv1')==plan.explain('conv1')
    assert same(merge(again, ms, base), merge(plan, ms, base))

def test_save_does_not_overwrite(tmp_path):
    file,new = plan_of().save(tmp_path/'p.csv'),plan_of(base=1.)
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match='p.csv exists.*overwrite=True'): new.save(file)
    assert file.read_bytes()==before
    assert Plan.load(new.save(file, overwrite=True)).digest==new.digest
    assert [o.name for o in tmp_path.iterdir()]==['p.csv']

def fail(*a, **k): raise OSError('disk full')

def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr('os.replace', fail)
    with pytest.raises(OSError, match='disk full'): plan_of().save(tmp_path/'p.csv')
    assert list(tmp_path.iterdir())==[]

def spreadsheet(text):
    "What a spreadsheet does to a CSV file: cells in, cells out"
    out = StringIO()
    csv.writer(out).writerows(csv.reader(StringIO(text)))
    return out.getvalue()

@pytest.mark.parametrize('edit', [lambda s: s.replace('\n', '\r\n'), lambda s: '\ufeff'+s,
    lambda s: s+'\n', spreadsheet], ids=['crlf','bom','blank line','spreadsheet'])
def test_edited_elsewhere(edit, tmp_path):
    plan = make_plan('snr_winner', [A, B])
    file = plan.save(tmp_path/'p.csv')
    file.write_bytes(edit(file.read_text(encoding='utf-8')).encode())
    assert Plan.load(file).digest==plan.digest

def test_edited_by_hand(tmp_path):
    ms = dict(x=A, y=B)
    plan = make_plan('standard', ms)
    file = plan.save(tmp_path/'p.csv')
    row = 'conv2.weight,conv2,matrix,linear,'
    assert row+'0.0,0.5,0.5' in file.read_text()
    file.write_text(file.read_text().replace(row+'0.0,0.5,0.5', row+'0,.25,0.75'))
    edited = Plan.load(file)
    assert merge(edited, ms)['conv2.weight'].equal(.25*A.conv2.weight + .75*B.conv2.weight)
    assert edited.diff(plan).name.tolist()==['conv2.weight']

def line(i, f):
    "Change line `i` of a file"
    def edit(s):
        lines = s.splitlines()
        return '\n'.join(lines[:i]+[f(lines[i])]+lines[i+1:]).encode()
    return edit
def to(new): return lambda o: new
def swap(old, new): return lambda o: o.replace(old, new, 1)

@pytest.mark.parametrize('damage,words', [
    (lambda s: b'', ['p.csv']),
    (lambda s: b'once upon a time\nthere was a plan', ['p.csv', 'first line']),
    (lambda s: b'\xff\xfe\x00\x01'*50, ['p.csv']),
    (lambda s: s.partition('\n')[2].encode(), ['p.csv', 'first line']),
    (lambda s: s.partition('\n')[0].encode(), ['p.csv']),
    (line(0, to('# 3')), ['p.csv', 'first line']),
    (line(0, to('# "models"')), ['p.csv', 'first line']),
    (line(0, to('# {}')), ['p.csv', 'models']),
    (line(0, to('# {"models": 3}')), ['p.csv', 'models']),
    (line(0, to('# {"models": ["x", "z"]}')), ["'z'"]),
    (line(1, swap('op', 'operation')), ["'op'"]),
    (line(3, swap('0.5', 'half')), ['conv1.bias']),
    (line(3, swap('0.5', '')), ['conv1.bias']),
    (line(3, swap('0.5', 'nan')), ['conv1.bias']),
    (line(3, lambda o: o[:30]), ['conv1.bias']),
    (line(3, lambda o: o+',1,2,3'), ['p.csv']),
    (line(3, swap('bias', 'weight')), ['conv1.weight', 'twice']),
    (line(3, swap('linear', 'tie')), ["'tie'"])], ids='''empty prose binary no_head head_only
    number text no_models models_number other_models column word blank nan cut long twice
    op'''.split())
def test_broken_file(damage, words, tmp_path):
    file = make_plan('standard', dict(x=A, y=B)).save(tmp_path/'p.csv')
    file.write_bytes(damage(file.read_text()))
    with pytest.raises(ValueError) as e: Plan.load(file)
    assert [o for o in words if o not in str(e.value)] == []

def test_explain():
    plan = plans('snr_winner', 2)
    assert plan.explain('conv1').count('\n')==7 and plan.explain('bn1.bias').count('\n')==1
    words = 'snr_winner','largest SNR','matrix of conv1','estimator=flip','top=50'
    assert [o for o in words if o not in plan.explain('conv1.weight')] == []
    assert plan.explain('fc.bias').count('kept per task')==2
    with pytest.raises(KeyError, match="no tensor or unit 'conv7'"): plan.explain('conv7')

def test_diff():
    a,b = make_plan('standard', [A, B]),make_plan('snr_lowA', [A, B], threshold=1e9)
    d = a.diff(b).set_index('name')
    assert set(d.index)=={k for k in state(A) if k[:2]!='fc'} and a.diff(a).empty
    assert d.loc['conv1.bias'].tolist()==['average of a, b','all a']
    c = make_plan('standard', dict(x=A, y=B))
    with pytest.raises(ValueError, match=r"\['a', 'b'\] and \['x', 'y'\]"): a.diff(c)

# --- merge

dtypes = torch.bfloat16,torch.float16,torch.float32,torch.float64

def cast(m, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v.clone() for k,v in state(m).items()}

@pytest.mark.parametrize('dtype', dtypes, ids=str)
@pytest.mark.parametrize('n,strategy', two_or_three)
def test_equal_models_come_back(n, strategy, dtype):
    "Whatever is decided, of two bit for bit; three thirds of a number may miss its last bit"
    m = cast(B, dtype)
    plan = make_plan(strategy, [m]*n, m, **useful(strategy, of='weights', top=100))
    assert strategy=='standard' or plan.table.snr_a.dropna().min() > 0
    rtol = 2*torch.finfo(dtype).eps
    for k in plan.models:
        got = task_state(merge(plan, [m]*n, m), k)
        if n==2: assert same(got, m)
        else: assert all(torch.allclose(got[o], v, rtol=rtol, atol=0) for o,v in m.items())

@pytest.mark.parametrize('dtype', dtypes, ids=str)
@pytest.mark.parametrize('strategy', ['standard','base_reset','snr_winner','snr_weighted'])
def test_reference(strategy, dtype):
    "One sum in fp32 (fp64 for fp64), rounded once"
    ms,base = {k: cast(m, dtype) for k,m in models(3).items()},cast(expert(0, 7), dtype)
    plan = make_plan(strategy, ms, base, **useful(strategy, of='weights', top=60))
    wide,merged = torch.float64 if dtype==torch.float64 else torch.float32,merge(plan, ms, base)
    for k,c in coefs(plan).iterrows():
        src = {m: o[k.partition('@')[0]] for m,o in [*ms.items(), ('base', base)]}
        if not src['t1'].is_floating_point(): continue
        want = sum(v*src[m].to(wide) for m,v in c.items() if v).to(dtype)
        assert merged[k].dtype==dtype and merged[k].equal(want)

def test_mixed_dtypes():
    "The first model's dtype, from a sum that is not rounded before"
    ms = [cast(A, torch.bfloat16), cast(B, torch.float32)]
    want = .5*ms[0]['conv1.weight'].float() + .5*ms[1]['conv1.weight']
    assert merge(make_plan('standard', ms), ms)['conv1.weight'].equal(want.bfloat16())

@pytest.mark.parametrize('strategy', strategies)
def test_inputs_untouched(strategy):
    "Neither by the merge nor by what is done to its result"
    ms,base = [cast(m, torch.float32) for m in (A, B)],cast(expert(0), torch.float32)
    before = copy.deepcopy([*ms, base])
    merged = merge(make_plan(strategy, ms, base), ms, base)
    for t in merged.values(): t.zero_()
    assert all(same(a, b) for a,b in zip([*ms, base], before))

def test_merged_state_loads():
    m = copy.deepcopy(expert(1, 2))
    m.load_state_dict(task_state(merge(plans('snr_max', 2), models()), 't1'))
    assert m.fc.weight.equal(expert(1, 2).fc.weight)
    assert not m.conv1.weight.equal(expert(1, 2).conv1.weight)

def some_base(t): return t.assign(base=.1)
def nothing(t): return t.assign(a=0., b=0.)

@pytest.mark.parametrize('edit,ms,base,words', [
    (None, dict(x=A, y=B), None, ["['a', 'b']", "['x', 'y']"]),
    (None, dict(b=A, a=B), None, ["['b', 'a']", 'order']),
    (None, [A, B, C], None, ["['a', 'b', 'c']"]),
    (None, [A, without(B, 'bn1.bias')], None, ['bn1.bias is not in b']),
    (None, [A, plus(B, x=ids*1.)], None, ['x of b is not in the plan']),
    (None, [A, wide], None, ['conv1.weight has different shapes in a, b']),
    (None, [A, changed(B, 'bn1.bias', put(nan))], None, ['bn1.bias of b', 'NaN', 'repair']),
    (nothing, [A, B], None, ['conv1.weight has coefficients 0 only']),
    (some_base, [A, B], None, ['conv1.weight', 'base=']),
    (some_base, [A, B], wide, ['conv1.weight has different shapes in base, a, b']),
    (some_base, [A, B], without(A, 'bn2.bias'), ['bn2.bias is not in base'])],
    ids='names order number lost extra shape nan zero base base_shape base_lost'.split())
def test_plan_and_models_do_not_fit(edit, ms, base, words):
    plan = make_plan('standard', [A, B], heads=[])
    if edit: plan = Plan(edit(plan.table), plan.meta)
    with pytest.raises(ValueError) as e: merge(plan, ms, base)
    assert [o for o in words if o not in str(e.value)] == []

# --- folders

@pytest.fixture
def folders(tmp_path):
    "Two experts as Hugging Face folders"
    for k,m in dict(x=A, y=B).items():
        (tmp_path/k).mkdir()
        save_file(state(m), tmp_path/k/'model.safetensors')
        (tmp_path/k/'config.json').write_text(json.dumps(dict(name=k)))
    return dict(x=tmp_path/'x', y=str(tmp_path/'y'))

def in_order(sd): return dict(sorted(sd.items()))

@pytest.mark.parametrize('heads', [None, []], ids=['own heads','merged heads'])
def test_out(folders, heads, tmp_path):
    plan = make_plan('snr_weighted', folders, heads=heads)
    out,want = merge(plan, folders, out=tmp_path/'out'),merge(plan, dict(x=A, y=B))
    for k in 'xy': assert same(in_order(load_task(out, k)), in_order(task_state(want, k)))
    assert set(load_file(out/'model.safetensors'))=={k for k in want if '@' not in k}
    assert (out/'heads').exists()==(heads is None)
    assert Plan.load(out/'plan.csv').digest==plan.digest
    assert json.loads((out/'config.json').read_text())==dict(name='x')
    with safe_open(out/'model.safetensors', 'pt') as f: meta = f.metadata()
    assert meta['plan_digest']==plan.digest
    assert make_plan('standard', [out, out]).digest # opens as a model again

def test_load_task_names_tasks(folders, tmp_path):
    out = merge(make_plan('standard', folders), folders, out=tmp_path/'out')
    for task in (None, 'z'):
        with pytest.raises(KeyError, match='has heads for x, y'): load_task(out, task)
    with pytest.raises(FileNotFoundError): load_task(tmp_path/'nowhere', 'x')

def test_out_is_not_overwritten(folders, tmp_path):
    plan,before = make_plan('standard', folders),sorted(tmp_path.rglob('*'))
    with pytest.raises(FileExistsError, match='x exists and is not empty: choose a new folder'):
        merge(plan, folders, out=folders['x'])
    assert sorted(tmp_path.rglob('*'))==before

@pytest.mark.parametrize('where,call', [('os.pwrite',1), ('os.pwrite',3), ('os.fdatasync',1),
    ('os.posix_fallocate',1), ('os.posix_fallocate',2), ('shutil.copyfile',1), ('os.rename',1),
    ('os.fsync',1), ('os.fsync',4)])
def test_out_is_atomic(folders, tmp_path, monkeypatch, where, call):
    "A failure half-way leaves the inputs as they were, no result, and nothing behind but finished work, from which the next goes on"
    import os, shutil
    mod,name = where.split('.')
    real,plan,calls = getattr(dict(os=os, shutil=shutil)[mod], name),make_plan('standard', folders),[]
    before = {o: o.is_file() and o.read_bytes() for o in tmp_path.rglob('*')}
    def fails_in_time(*a):
        calls.append(a)
        return fail() if len(calls)==call else real(*a)
    monkeypatch.setattr(where, fails_in_time)
    with pytest.raises(OSError, match='disk full'): merge(plan, folders, out=tmp_path/'new/out')
    monkeypatch.undo()
    kept = tmp_path/'new'
    assert {o: o.is_file() and o.read_bytes() for o in tmp_path.rglob('*') if not o.is_relative_to(kept)}==before
    assert not (kept/'out').exists() and kept.exists()==(where in ('shutil.copyfile', 'os.rename'))
    merge(plan, folders, out=kept/'out')
    assert [o.name for o in kept.iterdir()]==['out']

def test_out_takes_files_of_its_models_only(tmp_path, monkeypatch):
    "A folder that happens to be called like the class of a model in memory is none of them"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'Sequential').mkdir()
    (tmp_path/'Sequential/config.json').write_text('{}')
    out = merge(make_plan('standard', [A, B]), [A, B], out=tmp_path/'out')
    assert not (out/'config.json').exists()

def test_base_of_another_size():
    "A row that would take a tensor of another shape from the base is refused"
    base = plus(A, **{'fc.weight': torch.zeros(5, 24), 'fc.bias': torch.zeros(5)})
    plan = make_plan('base_reset', [A, expert(2, classes=2)], base, protocol='paper',
        estimator='paper_vision', threshold=1e9)
    with pytest.raises(ValueError, match='fc.weight has different shapes in base, a, b'):
        merge(plan, [A, expert(2, classes=2)], base)

@pytest.mark.parametrize('strategy,kw', [('snr_weighted', dict(threshold=1)),
    ('snr_winner', dict(top=50))])
def test_infinite_snr(strategy, kw):
    "Spectrum's score is inf where nothing lies below its threshold: no weight, no percentile"
    scans = {k: scan(m, estimator='spectrum', progress=False) for k,m in dict(a=A, b=B).items()}
    for df in scans.values(): df.snr = inf
    with pytest.raises(ValueError, match="conv1 has SNR inf.*estimator='flip'"):
        make_plan(strategy, [A, B], estimator='spectrum', scans=scans, **kw)
    plan = make_plan('snr_winner', [A, B], estimator='spectrum', scans=scans, threshold=1)
    assert (coefs(plan).b[plan.table.role.eq('matrix').to_numpy()]==1).all()
