"Noise edges: six kinds of noise, seven shapes, planted spikes, invariance, degenerate input, and what says that it does not fit."
import numpy as np, pytest, torch, warnings
from math import sqrt
from scipy.stats import binom
from spectrum_merging.edges import (balance, biwhiten, default_estimator, dyson, equalise, flip, flip_edge, flipped_tops,
    largest_eigenvalue, measure, n_draws, random_signs, shrink, snr)
from spectrum_merging.operations import shrink_mean
from spectrum_merging.plan import Plan, make_plan
from spectrum_merging.rules import recipe
from spectrum_merging.scan import scan
from spectrum_merging.spectrum import spectrum

# Runs of each kind: as many as a second or two allow.
runs = {(64,64): 30, (64,147): 30, (64,576): 20, (96,96): 30, (512,256): 10, (384,384): 8, (768,3072): 1}
kinds = 'one size','rows','columns','both','heavy tails','power law'
estimators = dict(mp=spectrum, flip=flip, biwhiten=biwhiten, dyson=dyson)

def noise(kind, m, n, rng):
    "One matrix of pure noise"
    def sizes(k, sd): return np.exp(sd*rng.standard_normal(k))
    def falling(k): return (1+rng.permutation(k))**-.5
    X = rng.standard_t(3, (m, n)) if kind=='heavy tails' else rng.standard_normal((m, n))
    if kind=='rows': X *= sizes(m, .7)[:,None]
    if kind=='columns': X *= sizes(n, .7)
    if kind=='both': X *= sizes(m, .5)[:,None]*sizes(n, .5)
    if kind=='power law': X *= falling(m)[:,None]*falling(n)
    return X

def threshold(kind, X):
    "Strength at which a spike's singular value leaves this noise: its norm, but for noise of one size, where it is known"
    if kind!='one size': return np.linalg.norm(X, 2)
    m,n = sorted(X.shape)
    return (m/n)**.25*sqrt(n)

def planted(X, strengths, rng):
    U,V = (np.linalg.qr(rng.standard_normal((k, len(strengths))))[0] for k in X.shape)
    return X + (U*np.array(strengths))@V.T

def id_of(o): return 'x'.join(map(str, o)) if isinstance(o, tuple) else None

@pytest.mark.parametrize('shape', runs, ids=id_of)
@pytest.mark.parametrize('kind', kinds)
def test_noise_and_spikes(kind, shape):
    "At most 2 % false alarms, and 9 of 10 spikes at 1.6 times the threshold found: alone, and beside two stronger ones"
    rng,n = np.random.default_rng([kinds.index(kind), *shape]),runs[shape]
    drawn = [noise(kind, *shape, rng) for _ in range(n)]
    alarms = sum(flip(X).n_spikes>0 for X in drawn)
    assert alarms <= binom.ppf(.999, n, .02)
    for strengths in (1.6,),(6., 2.5, 1.6):
        found = [flip(planted(X, np.array(strengths)*threshold(kind, X), rng)).n_spikes for X in drawn]
        # Where noise of one size is small and square, its end is a blur a fifth as wide as the way to such a spike.
        enough = .75 if shape==(64,64) and kind=='one size' else .9 if n>20 else .8
        assert np.mean(np.array(found)==len(strengths)) >= enough, found

def test_alarms_of_all_kinds_together():
    "Small matrices, many draws: the rate itself"
    rng = np.random.default_rng(1)
    alarms = [flip(noise(k, 64, 96, rng)).n_spikes>0 for k in kinds for _ in range(120)]
    assert np.mean(alarms) <= .02

@pytest.mark.parametrize('name', ['biwhiten','dyson'])
@pytest.mark.parametrize('kind', ['one size','rows','columns','both','power law'])
def test_whitening(name, kind):
    "Noise whose size is a product of rows and columns has no spikes, and one spike is found"
    rng = np.random.default_rng(2)
    drawn = [noise(kind, 96, 200, rng) for _ in range(40)]
    f = estimators[name]
    assert sum(f(X).n_spikes>0 for X in drawn) <= binom.ppf(.999, 40, .02)
    found = [f(planted(X, [1.6*threshold(kind, X)], rng)) for X in drawn]
    assert np.mean([o.n_spikes>=1 for o in found]) >= .9
    assert np.mean([o.n_spikes for o in found]) < 1.3

def test_rows_and_columns_are_recovered():
    rng = np.random.default_rng(3)
    x,y = np.exp(rng.standard_normal(150)),np.exp(.5*rng.standard_normal(400))
    X = np.sqrt(x)[:,None]*rng.standard_normal((150, 400))*np.sqrt(y)
    for found in balance(X*X),equalise(X, X@X.T):
        assert np.corrcoef(np.log(found[0]), np.log(x))[0,1] > .98
        assert np.corrcoef(np.log(found[1]), np.log(y))[0,1] > .95
        fit = np.log(np.outer(*found)/np.outer(x, y))
        assert abs(fit.mean()) < .05
    rows,cols = balance(X*X)
    assert (X*X/rows[:,None]/cols).mean(0) == pytest.approx(1, abs=1e-6)
    assert (X*X/rows[:,None]/cols).mean(1) == pytest.approx(1, abs=1e-6)

# --- invariance

rng = np.random.default_rng(4)
spiked = {s: planted(noise('both', *s, rng), np.array([4., 2.])*np.linalg.norm(noise('both', *s, rng), 2), rng)
    for s in [(96,200),(120,120)]}
fields = 'snr','snr_ratio','stable_rank','effective_rank','ks'

def same(s, t, rel=1e-5, scale=1.):
    assert s.n_spikes == t.n_spikes > 0 and s.fits==t.fits
    for k in fields: assert getattr(s, k) == pytest.approx(getattr(t, k), rel=rel)
    assert (s.sigma, s.edge, s.norm) == pytest.approx((t.sigma*scale, t.edge*scale**2, t.norm*scale), rel=rel)

@pytest.mark.parametrize('f', [flip, biwhiten, dyson])
@pytest.mark.parametrize('W', spiked.values(), ids=map(id_of, spiked))
def test_transposition_scale_and_offset(f, W):
    one = f(W)
    same(f(W.T), one)
    for c in -1.,3.,2.**40,1e-30: same(f(c*W), one, scale=abs(c))
    same(f(W+.5), one, 1e-4)
    same(f(torch.tensor(W).reshape(W.shape[0], -1, 2)), one)

def test_the_same_always():
    "Nothing is left to chance, and powers of two change no bit"
    W = spiked[96,200]
    a,b = flip(W),flip(W*8)
    assert a.edge==flip(W.copy()).edge and b.edge==64*a.edge and (a.n_spikes, a.snr)==(b.n_spikes, b.snr)

def test_workers_change_no_bit():
    model = {f'layers.{i}.weight': torch.tensor(noise('both', 64, 96, np.random.default_rng(i))) for i in range(6)}
    one,*others = [scan(model, n_workers=k, progress=False) for k in (1, 2, 5)]
    assert set(one.estimator)=={default_estimator} and {'fits','edge_error'} <= {*one}
    for o in others: assert o.equals(one)

def test_signs():
    "Half of them negative, independent of each other; symmetric where a matrix could be turned"
    S = 1-2.*(random_signs(60, 90, 0)>0)
    assert abs(S.mean()) < .05 and np.linalg.norm(S, 2) < 1.1*(sqrt(60)+sqrt(90))
    assert (random_signs(60, 90, 0)!=random_signs(60, 90, 1)).any()
    T = random_signs(50, 50, 3)
    assert (T==T.T).all() and set(np.unique(T))=={0, 1<<31}

@pytest.mark.parametrize('shape', [(1,5), (2,2), (3,50), (64,576), (200,200)], ids=id_of)
def test_largest_eigenvalue(shape):
    A = np.random.default_rng(5).standard_normal(shape).astype('f4')
    assert largest_eigenvalue(A, np.ones(shape[0], 'f4'))[0] == pytest.approx(np.linalg.norm(A, 2)**2, rel=2e-3)
    low = (A[:,:1]@A[:1])
    assert largest_eigenvalue(low, np.ones(shape[0], 'f4'))[0] == pytest.approx(np.linalg.norm(low, 2)**2, rel=1e-4)

def test_edge_is_above_what_is_drawn():
    tops = flipped_tops(np.random.default_rng(6).standard_normal((64, 100)).astype('f4'), 8)[0]/100
    edge,error = flip_edge(tops, 64, 100)
    assert edge > tops.max() and 0 < error < .1*edge
    assert flip_edge(tops, 64, 100, .2)[0] < edge < flip_edge(tops, 64, 100, .001)[0]
    assert 6 <= n_draws(4096, 14336) <= n_draws(64, 64) <= 20

# --- input at the borders

@pytest.mark.parametrize('f', estimators.values(), ids=estimators)
@pytest.mark.parametrize('W', [np.ones((4, 9)), np.zeros((5, 5)), np.eye(3), np.ones((1, 8)), np.arange(8.)[None],
    np.arange(10.).reshape(2, 5), np.outer(np.arange(6.), np.arange(9.)), np.diag([1e8, 1., 1., 1.])], ids=range(8))
def test_small_and_degenerate(f, W):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        s = f(W)
    assert 0 <= s.n_spikes <= min(W.shape)
    assert all(np.isfinite(o).all() for o in (s.eigs, s.edge, s.theta, s.snr, s.ks, s.norm, s.sigma))

@pytest.mark.parametrize('f', [flip, biwhiten, dyson])
def test_dead_rows_and_columns(f):
    W = noise('rows', 96, 200, np.random.default_rng(7))
    W[10:30] = 0
    W[:,5:50] = 0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert f(W).n_spikes == 0

@pytest.mark.parametrize('size', [1e-300, 1e-160, 1e160, 1e300])
@pytest.mark.parametrize('f', [flip, biwhiten, dyson])
def test_range_of_fp64(f, size):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        s,t = f(spiked[96,200]*size),f(spiked[96,200])
    assert s.n_spikes==t.n_spikes and s.snr==pytest.approx(t.snr, rel=1e-6) and s.sigma/size==pytest.approx(t.sigma, rel=1e-6)

@pytest.mark.parametrize('f', [flip, biwhiten, dyson])
def test_not_a_number_has_a_name(f):
    W = np.ones((4, 6))
    W[1,2] = np.nan
    with pytest.raises(ValueError, match='layer.*holds 1 NaN'): f(W, name='layer')
    with pytest.raises(ValueError, match='2 or more dimensions'): f(np.ones(4))

def test_low_rank_without_noise():
    "What has no noise at all is all signal, and no rounding error is a spike"
    rng = np.random.default_rng(8)
    W = rng.standard_normal((80, 3))@rng.standard_normal((3, 120))
    for dtype in (torch.float64, torch.float32): assert flip(torch.tensor(W, dtype=dtype)).n_spikes == 3

# --- what does not fit says so

def falling(m=200, n=400):
    "Singular values that fall evenly: no bulk"
    rng = np.random.default_rng(9)
    U,V = (np.linalg.qr(rng.standard_normal((k, m)))[0] for k in (m, n))
    return (U*np.exp(-np.arange(m)/60))@V.T

def test_fits():
    rng = np.random.default_rng(10)
    plain,rows = rng.standard_normal((128, 300)),noise('rows', 128, 300, rng)
    assert spectrum(plain).fits and flip(plain).fits and dyson(plain).fits
    assert not spectrum(rows).fits and flip(rows).fits
    for f in spectrum,flip: assert not f(falling()).fits
    assert 0 < flip(falling()).n_spikes < 60 < spectrum(falling()).n_spikes

def test_plan_says_what_does_not_fit(tmp_path):
    rng = np.random.default_rng(11)
    def model(W): return {'a.weight': torch.tensor(W), 'b.weight': torch.tensor(rng.standard_normal((64, 90)))}
    bad,good = falling(),rng.standard_normal((200, 400))
    plan = make_plan('snr_winner', dict(x=model(bad), y=model(bad+1e-4*good)))
    assert plan.meta['unfit']==dict(x=1, y=1) and plan.table.unfit.tolist()==['x, y','']
    assert 'does not describe the bulk in x, y' in plan.explain('a.weight') and 'does not describe' not in plan.explain('b.weight')
    assert Plan.load(plan.save(tmp_path/'plan.csv')).explain('a.weight')==plan.explain('a.weight')
    assert 'unfit' not in make_plan('snr_winner', dict(x=model(good), y=model(2*good))).meta

# --- the level of plain noise

@pytest.mark.parametrize('shape,most', [((96,96), .009), ((64,576), .0045), ((256,512), .0025)], ids=id_of)
def test_level_of_the_bulk(shape, most):
    "Less than half the scatter of the median (.018 at 96 × 96), and no bias, with and without spikes"
    rng = np.random.default_rng(12)
    for strengths in [],[8., 4., 2.]:
        found = [spectrum(planted(rng.standard_normal(shape), np.array(strengths)*sqrt(max(shape)), rng) if strengths
            else rng.standard_normal(shape)).sigma for _ in range(60)]
        assert np.std(found) < most and abs(np.mean(found)-1) < .003

def test_shrinkage_by_the_edge():
    "Under uneven noise the drawn edge brings the truth nearer than the edge of noise of one size"
    rng = np.random.default_rng(13)
    X = noise('rows', 100, 200, rng)
    truth = planted(0*X, [3*np.linalg.norm(X, 2)], rng)
    error = {k: np.linalg.norm(shrink(truth+X, k)-truth) for k in ('mp','flip')}
    assert error['flip'] < .7*error['mp'] and error['flip'] < .5*np.linalg.norm(X)
    two = [truth+X, truth-X]
    exact = sum(shrink(d, 'flip') for d in two) # of which the operation has the level on a grid
    assert np.linalg.norm(shrink_mean(two, estimator='flip')-exact) < 1e-3*np.linalg.norm(exact)
    for bad in 'dyson','paper_nlp':
        with pytest.raises(ValueError, match=f'{bad} has no edge'): shrink(X, bad)
    assert recipe('shrink_mean(estimator=flip)').text=='shrink_mean(estimator=flip)'

def test_one_call():
    W = spiked[96,200]
    assert measure(W)['n_spikes']==flip(W).n_spikes and snr(W)==flip(W).snr and snr(W, 'mp')==spectrum(W).snr
    assert {'fits','edge_error'} <= {*measure(W)}

@pytest.mark.parametrize('shape', [(64,300), (120,120), (90,40)], ids=id_of)
@pytest.mark.parametrize('kind', kinds)
def test_in_pieces(kind, shape, monkeypatch):
    "A large matrix, which is flipped in pieces, has the same edge to within its error"
    rng = np.random.default_rng(14)
    X = noise(kind, *shape, rng)
    for W in X,planted(X, [2.5*threshold(kind, X)], rng):
        one = flip(W)
        with monkeypatch.context() as m:
            m.setattr('spectrum_merging.edges.IN_MEMORY', 0)
            m.setattr('spectrum_merging.spectrum.PIECE', 37*min(shape))
            two,turned = flip(W),flip(W.T)
        # Other draws: a direction on the border may fall to either side.
        assert abs(two.n_spikes-one.n_spikes)<=1 and two.n_spikes==turned.n_spikes
        if two.n_spikes==one.n_spikes: assert two.edge==pytest.approx(one.edge, rel=.15)
        assert turned.edge==pytest.approx(two.edge, rel=1e-2)

@pytest.mark.parametrize('shape', [(240,640), (300,300), (640,240)], ids=id_of)
@pytest.mark.parametrize('kind', ['one size','both','heavy tails'])
def test_largest_alone(kind, shape, monkeypatch):
    "Above a size only spikes are computed: the same copies, edge and spikes, and an error bound that holds"
    rng = np.random.default_rng(15)
    X = noise(kind, *shape, rng)
    W = planted(X, [o*threshold(kind, X) for o in (5, 3, 2.5)], rng)
    monkeypatch.setattr('spectrum_merging.edges.IN_MEMORY', 0) # the signs that pieces have
    whole = flip(W)
    monkeypatch.setattr('spectrum_merging.edges.LARGE', 1)
    monkeypatch.setattr('spectrum_merging.largest.BLOCK', 8)
    some = flip(W)
    assert not whole.eigs_error and 0 < some.eigs_error <= .01
    # A direction on the border may fall to either side.
    k = min(whole.n_spikes, some.n_spikes)
    assert k >= 3 and abs(some.n_spikes-whole.n_spikes)<=1 and some.edge==pytest.approx(whole.edge, rel=5e-3)
    if some.n_spikes==whole.n_spikes: assert some.snr==pytest.approx(whole.snr, rel=.01)
    assert (abs(some.eigs[:k]/whole.eigs[:k]-1) <= some.eigs_error).all() and some.norm==pytest.approx(whole.norm, rel=1e-6)
    assert len(some.eigs)==len(whole.eigs) and some.effective_rank==pytest.approx(whole.effective_rank, rel=.15)
    assert measure(W)['eigs_error']==some.eigs_error and flip(W.T).n_spikes==some.n_spikes

def test_largest_refuses(monkeypatch):
    "Where a few eigenvalues cannot stand for a matrix, all are computed; a NaN is an error as ever"
    rng = np.random.default_rng(16)
    odd = dict(lowrank=rng.normal(size=(96, 4))@rng.normal(size=(4, 200)), ones=np.ones((96, 200)), tiny=1e-200*rng.normal(size=(96, 200)),
        one=rng.normal(size=(96, 200))+1e5*np.outer(rng.normal(size=96), rng.normal(size=200)))
    want = {k: flip(W) for k,W in odd.items()}
    monkeypatch.setattr('spectrum_merging.edges.LARGE', 1)
    monkeypatch.setattr('spectrum_merging.largest.BLOCK', 8)
    for k,W in odd.items():
        got = flip(W)
        assert not got.eigs_error and (got.n_spikes, got.snr, got.edge)==(want[k].n_spikes, want[k].snr, want[k].edge), k
    W = rng.normal(size=(96, 200))
    W[3,7] = np.nan
    with pytest.raises(ValueError, match='1 NaN'): flip(W)
