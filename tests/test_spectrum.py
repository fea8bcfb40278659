"Spectra of noise, planted spikes, degenerate and wrong input; estimators against plain numpy."
import numpy as np, pytest, torch
from math import inf, pi, sqrt
from scipy.integrate import quad
from scipy.stats import binom
from spectrum_merging.rules import rule_names
from spectrum_merging.spectrum import (median_blur, mp_cdf, mp_density, mp_edges,
    mp_median, noise_edge, spectrum, tw_quantile)
from spectrum_merging.edges import flip, shrink, shrinker, snr

estimators = 'mp','paper_nlp','paper_vision','spectrum'

draws = {(64,64): 2000, (64,576): 1500, (64,147): 2000, (512,256): 150, (768,768): 12,
    (768,3072): 6, (3072,768): 6}
def shape_id(o): return 'x'.join(map(str, o))
def gen(*key): return torch.Generator().manual_seed(sum(k*1009**i for i,k in enumerate(key)))
def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=gen(seed, *shape), dtype=torch.float64).to(dtype)

def plant(m, n, thetas, seed=0):
    "Noise of variance 1 plus spikes of strengths `thetas`, and the spikes' left vectors"
    u,v = (torch.linalg.qr(noise(k, len(thetas), seed=seed+i))[0] for i,k in enumerate((m, n), 100))
    strengths = torch.tensor(thetas, dtype=torch.float64)*sqrt(max(m, n))
    return noise(m, n, seed=seed) + (u*strengths)@v.T, u

# --- 1, 4, 5: pure noise

@pytest.fixture(scope='module', params=draws, ids=shape_id)
def spectra(request):
    "Many spectra of noise of one shape, σ = 1"
    g = gen(1, *request.param)
    return [spectrum(torch.randn(request.param, generator=g)) for _ in range(draws[request.param])]

def test_noise_has_no_spikes(spectra):
    "No more alarms than α = .01 gives in 999 of 1,000 seeds, hence ≥ 98 of 100 without"
    assert sum(s.n_spikes>0 for s in spectra) <= binom.ppf(.999, len(spectra), .01)
    assert all((s.n_spikes==0)==(s.snr==0)==(s.snr_ratio==0)==(not len(s.theta)) for s in spectra)

def test_noise_snr(spectra): assert np.mean([s.snr for s in spectra]) < .01

def test_noise_sigma(spectra):
    s = np.array([s.sigma for s in spectra])
    assert abs(s.mean()-1) < .005
    m,n = spectra[0].m,spectra[0].n # a small square matrix does not tell σ to 1.5 % by its median
    assert abs(s-1).mean() < max(.015, .4*median_blur(m, n))

def test_noise_ks(spectra):
    d = np.array([s.ks*s.m for s in spectra])
    assert 1 <= d.min() and d.max() <= 6

def test_noise_moments(spectra):
    "E λ = σ²; E λ² = σ⁴(1+β), and 1/n more in a finite matrix"
    s0,e = spectra[0],np.array([s.eigs for s in spectra])
    tol = 5/sqrt(e.size*s0.n)
    assert e.mean() == pytest.approx(1-1/(s0.m*s0.n), abs=tol)
    assert (e**2).mean() == pytest.approx(1+s0.beta+1/s0.n, abs=6*tol)

@pytest.mark.parametrize('estimator', ['mp','paper_nlp'])
def test_paper_nlp_takes_a_shape_for_signal(estimator):
    "Fact 2: noise of 3072×768 scores 9.0 in the paper's text formula, 0 in the calibrated one"
    want = dict(mp=0, paper_nlp=9.0)[estimator]
    assert snr(noise(3072, 768), estimator) == pytest.approx(want, abs=.1)

# --- invariance

spiked = plant(96, 200, [4., 2., 1.2])[0]
fields = 'snr','snr_ratio','stable_rank','effective_rank','ks'

def same(s, t, rel, scale=1):
    assert s.n_spikes == t.n_spikes > 0
    for k in fields: assert getattr(s, k) == pytest.approx(getattr(t, k), rel=rel)
    assert s.theta == pytest.approx(t.theta, rel=rel)
    assert s.eigs == pytest.approx(t.eigs*scale**2, rel=rel)
    assert (s.sigma, s.edge) == pytest.approx((t.sigma*scale, t.edge*scale**2), rel=rel)

@pytest.mark.parametrize('scale', [-1, 3., 1e-6, 1e30, 1e-30])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_scale(scale, dtype):
    same(spectrum(spiked.to(dtype)*scale), spectrum(spiked), 1e-5, abs(scale))

changes = dict(transpose=lambda W: W.T, offset=lambda W: W+3, large_offset=lambda W: W-1e4,
    kernel=lambda W: W.reshape(96, 8, 5, 5), rows=lambda W: W[torch.randperm(96, generator=gen(1))],
    columns=lambda W: W.flip(1), numpy=lambda W: W.numpy(), list=lambda W: W.tolist(),
    parameter=torch.nn.Parameter)

@pytest.mark.parametrize('change', changes.values(), ids=changes)
def test_same_matrix(change): same(spectrum(change(spiked)), spectrum(spiked), 1e-6)

@pytest.mark.parametrize('dtype,rel', [(torch.float32,1e-5), (torch.float16,.005),
    (torch.bfloat16,.03)], ids=str)
def test_dtypes(dtype, rel): same(spectrum(spiked.to(dtype)), spectrum(spiked), rel)

@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
@pytest.mark.parametrize('W', [spiked.numpy(), np.outer(np.arange(40)%5, np.arange(60)%7)],
    ids=['full','low rank'])
def test_numpy_is_torch(dtype, W):
    W = W.astype(dtype)
    same(spectrum(W), spectrum(torch.from_numpy(W)), 1e-12)

def test_input_untouched():
    W = spiked.clone()
    spectrum(W), shrink(W), [snr(W, e) for e in estimators]
    assert W.equal(spiked)

# --- 2, 3: planted spikes

def crit(m, n): return (min(m, n)/max(m, n))**.25

@pytest.mark.parametrize('shape', [(400,800), (800,400), (512,512)], ids=shape_id)
@pytest.mark.parametrize('factor,tol', [(1.6,.05), (2.5,.02)])
def test_spike_found(shape, factor, tol):
    theta = factor*crit(*shape)
    s = [spectrum(plant(*shape, [theta], seed)[0]) for seed in range(8)]
    assert [o.n_spikes for o in s] == [1]*8
    assert np.mean([o.theta[0] for o in s]) == pytest.approx(theta, rel=tol)
    assert np.mean([o.snr for o in s]) == pytest.approx(theta**2/min(shape), rel=2*tol)

@pytest.mark.parametrize('shape', [(400,800), (512,512)], ids=shape_id)
def test_spike_below_transition_is_invisible(shape):
    made = [plant(*shape, [.7*crit(*shape)], seed) for seed in range(8)]
    assert [spectrum(W).n_spikes for W,_ in made] == [0]*8
    assert np.mean([(torch.linalg.eigh(W@W.T)[1][:,-1]@u[:,0]).item()**2 for W,u in made]) < .05

def test_seventy_spikes():
    "The level is right and nearly all are found, where var(W) is far off"
    c = crit(768, 3072)
    W,_ = plant(768, 3072, [10*c]*50 + [1.3*c]*20)
    s = spectrum(W)
    assert s.sigma == pytest.approx(1, rel=.01) and W.std() > 1.5
    assert 65 <= s.n_spikes <= 70
    assert s.theta[:50] == pytest.approx(10*c, rel=.1)

def test_snr_grows_with_the_spike():
    s = [spectrum(plant(128, 256, [t])[0]).snr for t in (0., .5, 1.5, 3., 6., 12., 50.)]
    assert s[:2] == [0, 0] and all(a<b for a,b in zip(s[1:], s[2:]))

# --- the law

betas = [1., .99, .75, .5, .25, .05, .01]

def law(x, b):
    "The Marchenko–Pastur density, σ = 1"
    return sqrt(max(0, ((1+sqrt(b))**2-x)*(x-(1-sqrt(b))**2)))/(2*pi*b*x)

@pytest.mark.parametrize('b', betas)
def test_mp_law(b):
    lo,hi = mp_edges(b)
    assert (lo, hi) == pytest.approx(((1-sqrt(b))**2, (1+sqrt(b))**2))
    x = lo+(hi-lo)*np.array([.01,.1,.3,.5,.8,.99])
    def area(t): return quad(lambda y: 2*y*law(y*y, b), sqrt(lo), sqrt(t), limit=200)[0] # x = y²
    assert mp_density(x, b) == pytest.approx([law(o, b) for o in x])
    assert mp_cdf(x, b) == pytest.approx([area(o) for o in x], abs=1e-7)
    assert mp_cdf([-1, 0, lo, hi, hi+1, 1e9], b) == pytest.approx([0,0,0,1,1,1], abs=1e-12)
    assert mp_density([-1, lo/2-1e-9, hi*1.01], b).tolist() == [0,0,0]
    assert area(mp_median(b)) == pytest.approx(.5, abs=1e-7)

@pytest.mark.parametrize('sigma', [.02, 3.])
def test_mp_law_scales(sigma):
    x = np.linspace(*mp_edges(.5, sigma), 9)
    assert mp_density(x, .5, sigma)*sigma**2 == pytest.approx(mp_density(x/sigma**2, .5), abs=1e-12)

@pytest.mark.parametrize('b,median', [(1.,.65278), (.5,.83047), (.25,.91600)])
def test_mp_median(b, median): assert mp_median(b) == pytest.approx(median, abs=1e-5)

@pytest.mark.parametrize('alpha,q', [(.1,.4501), (.05,.9793), (.01,2.0234), (.001,3.2724)])
def test_tracy_widom(alpha, q): assert tw_quantile(alpha) == pytest.approx(q, abs=.03)

@pytest.mark.parametrize('alpha', [0, 1, -.1, 1.1])
def test_alpha_checked(alpha):
    with pytest.raises(ValueError, match='alpha.*between 0 and 1'): tw_quantile(alpha)

@pytest.mark.parametrize('m,n', [(64,147), (768,3072)])
def test_noise_edge(m, n):
    "science.md §2 in other words; and a blurred noise level moves the edge out"
    mu = (sqrt(n-.5)+sqrt(m-.5))**2
    s = sqrt(mu)*(1/sqrt(n-.5)+1/sqrt(m-.5))**(1/3)
    assert noise_edge(m, n) == pytest.approx((mu+2.0234*s)/n, rel=1e-3)
    assert mp_edges(m/n)[1] < noise_edge(m, n, .05) < noise_edge(m, n) < noise_edge(m, n, blur=.02)

# --- other people's estimators, from science.md's words

def plain_vision(W):
    W = W.reshape(len(W), -1)
    e = np.linalg.eigvalsh(W@W.T/W.shape[1])
    return e[-1]/(np.median(e)+1e-8)

def plain_nlp(W):
    W = W.reshape(len(W), -1)
    N,M = W.shape
    e = np.maximum(np.linalg.eigvalsh(W.T@W/min(N, M)), 1e-9)
    edge = np.var(W)*(1+np.sqrt(min(N, M)/max(N, M)))**2
    return e[e>edge].sum()/(e[e<=edge].sum()+1e-9)

def plain_spectrum(W):
    W = W.reshape(len(W), -1)
    s = np.linalg.svd(W, compute_uv=False)
    q1,q3 = np.percentile(s, [25, 75])
    edge = (q3-q1)/1.349*(1+np.sqrt(min(W.shape)/max(W.shape)))
    with np.errstate(divide='ignore'): return s[s>edge].sum()/s[s<=edge].sum()/s.max()

@pytest.mark.parametrize('name,plain', [('paper_vision',plain_vision), ('paper_nlp',plain_nlp),
    ('spectrum',plain_spectrum)])
@pytest.mark.parametrize('shape', [(40,90), (90,40), (50,50), (24,8,3,3), (8,24,1,1), (64,3,7,7),
    (3,64,3,3), (64,3,3,3), (2,2)], ids=shape_id)
@pytest.mark.parametrize('spike', [0, .1])
def test_plain_numpy(name, plain, shape, spike):
    low = noise(shape[0], *[1]*(len(shape)-1), seed=1)*noise(1, *shape[1:], seed=2)
    W = .05*noise(*shape) + spike*low + .01
    rank_lost = len(W) > W[0].numel() # the vision formula then adds 1e-8 to rounding noise
    assert snr(W, name) == pytest.approx(plain(W.numpy()), rel=1e-6 if rank_lost else 1e-9)

def test_estimators_by_name():
    assert rule_names('estimator')[:4] == list(estimators)
    assert snr(spiked, "mp") == spectrum(spiked).snr > 0 and snr(spiked) == flip(spiked).snr
    assert snr(spiked, 'mp(alpha=0.5)') == spectrum(spiked, .5).snr # its settings, too

# --- degenerate and wrong input

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('shape', [(7,13), (13,7), (30,50), (64,3,7,7), (1,9), (2,2), (1,1)],
    ids=shape_id)
@pytest.mark.parametrize('value', [0, 1, .1, -3.3, 1e-3])
def test_constant_has_no_signal(value, shape, dtype):
    "A common offset is no signal, whatever its rounding"
    W = torch.full(shape, value, dtype=dtype)
    s = spectrum(W)
    assert (s.n_spikes, s.snr, s.snr_ratio) == (0, 0, 0)
    assert torch.allclose(shrink(W), W, rtol=1e-12, atol=0)

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    ids=str)
@pytest.mark.parametrize('shape', [(40,60), (60,40), (50,50)], ids=shape_id)
def test_rank_one(dtype, shape):
    "Exactly low rank: a very large ratio, and finite. Removing the mean may add a second spike"
    W = torch.outer(*(torch.arange(k)%5-1 for k in shape)).to(dtype)
    s = spectrum(W)
    assert s.n_spikes in (1, 2) and 1e3 < s.snr < inf and 1e3 < s.snr_ratio < inf
    assert s.effective_rank < 2.5 and np.isfinite(s.theta).all()

@pytest.mark.parametrize('shape', [(1,9), (9,1), (2,2), (2,1000), (1000,2), (1,1), (2,3),
    (3,1,1,1)], ids=shape_id)
def test_small(shape):
    s = spectrum(noise(*shape))
    assert len(s.eigs)==s.m and (s.m, s.n)==tuple(sorted(noise(*shape).flatten(1).shape))
    assert (s.n_spikes, s.snr) == (0, 0)
    assert np.isfinite([s.sigma, s.edge, s.stable_rank, s.effective_rank, s.ks]).all()

@pytest.mark.parametrize('estimator', estimators)
@pytest.mark.parametrize('shape', [(1,9), (9,1), (2,2), (1,1)], ids=shape_id)
@pytest.mark.parametrize('scale', [0, 1])
def test_small_everywhere(estimator, shape, scale):
    s = snr(scale*noise(*shape), estimator)
    assert s >= 0 and (s < inf or estimator=='spectrum')

@pytest.mark.parametrize('f', [spectrum, shrink, *[lambda W, e=e: snr(W, e) for e in estimators]],
    ids=['spectrum','shrink',*estimators])
@pytest.mark.parametrize('W,error,words', [
    (torch.tensor([[1.,float('nan')],[2.,3.]]), ValueError, '1 NaN and 0 Inf among 4 .*repair'),
    (torch.tensor([[1.,2.],[float('inf'),-float('inf')]]), ValueError,
        '0 NaN and 2 Inf among 4 .*repair'),
    (torch.tensor([[1,2],[3,4]]), TypeError, r'torch.int64.*float\(\)'),
    (torch.tensor([[True,False]]), TypeError, r'torch.bool.*float\(\)'),
    (torch.ones(2, 2)+0j, TypeError, 'torch.complex64.*real'),
    (torch.zeros(3, 0), ValueError, r'shape \(3, 0\).*non-empty'),
    (torch.zeros(0, 3), ValueError, r'shape \(0, 3\).*non-empty'),
    (torch.ones(3), ValueError, r'shape \(3,\).*2 or more'),
    (torch.tensor(1.), ValueError, r'shape \(\).*2 or more')],
    ids='nan inf int bool complex wide tall vector scalar'.split())
def test_refused(f, W, error, words, request):
    if W.ndim < 2 and 'paper_nlp' in request.node.callspec.id: assert f(W)==0 # as in the paper
    else:
        with pytest.raises(error, match=words): f(W)

@pytest.mark.parametrize('estimator', estimators)
def test_error_names_the_tensor(estimator):
    W = torch.full((2,2), torch.nan)
    with pytest.raises(ValueError, match='conv1.w holds 4 NaN'): snr(W, estimator, 'conv1.w')

def test_unknown_estimator():
    words = "'iqr'.*'mp', 'paper_nlp', 'paper_vision', 'spectrum'"
    with pytest.raises(ValueError, match=words): snr(spiked, 'iqr')

# --- shrinkage

@pytest.mark.parametrize('shape', [(100,300), (300,100), (150,150), (60,20,3,3)], ids=shape_id)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_shrink(shape, dtype):
    flat = noise(*shape).flatten(1).shape
    W,_ = plant(*flat, [4.,3.,2.])
    truth = W-noise(*flat)+.5
    W = (W+.5).reshape(shape).to(dtype)
    res = shrink(W)
    assert res.shape==W.shape and res.dtype==dtype
    error,before = ((o.double().reshape(flat)-truth).norm() for o in (res, W))
    assert error < .6*before

def test_shrink_takes_noise_out():
    W = noise(100, 300)+2
    assert (shrink(W)-2).norm() < .2*(W-2).norm()

@pytest.mark.parametrize('b', [1., .5, .1])
def test_shrinker(b):
    "0 up to the edge, continuous there, θ·overlaps above, never above y, y in the limit"
    edge = 1+sqrt(b)
    assert shrinker([0, .5*edge, edge], b).tolist() == [0,0,0]
    assert shrinker(edge*(1+1e-9), b) < 1e-3
    y = edge*np.array([1.01, 1.5, 3, 100])
    assert shrinker(y, b) == pytest.approx(np.sqrt((y**2-b-1)**2-4*b)/y)
    assert (shrinker(y, b) < y).all() and shrinker(1e4, b) == pytest.approx(1e4)
