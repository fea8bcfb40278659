"Operations on whole matrices: their formulas, their plans, their folders, their errors."
import json, math, numpy as np, os, pandas as pd, pytest, random, subprocess, sys, time, torch
from functools import partial
from hypothesis import given, settings, strategies as st
from pathlib import Path
from safetensors.torch import load_file, save_file
from spectrum_merging import folder, stream
from spectrum_merging.cli import merge_cli
from spectrum_merging.edges import measure
from spectrum_merging.interop import to_mergekit
from spectrum_merging.merge import load_task, merge
from spectrum_merging.factors import gram_svd, polar
from spectrum_merging.operations import *
from spectrum_merging.plan import Plan, make_plan, mixture, tensor_name
from spectrum_merging.preflight import PreflightError
from spectrum_merging.rules import recipe, rules as known
from spectrum_merging.scan import scan
from spectrum_merging.edges import shrink
from spectrum_merging.spectrum import snr_spectrum, spectrum
from spectrum_merging.strategies import lines, snr_gate, task_arithmetic
from spectrum_merging.verify import verify
from threadpoolctl import threadpool_info, threadpool_limits
from unittest.mock import patch

scripts = Path(sys.executable).parent
frugal = settings(max_examples=40, deadline=None, derandomize=True, database=None)
nan,inf = float('nan'),float('inf')
of_updates = dict(ridge_mean=ridge_mean, tsv_m=tsv_m, iso_c=iso_c, shrink_mean=shrink_mean, ties=ties,
    dare=dare, half_iso=partial(iso_c, beta=.5), all_tsv=partial(tsv_m, share=1.), edge_tsv=partial(tsv_m, rank='edge'),
    two_iso=partial(iso_c, rank=2), edge_iso=partial(iso_c, rank='edge'), iso_cts=iso_cts, half_cts=partial(iso_cts, common=.5),
    edge_cts=partial(iso_cts, rank='edge'), trimmed=partial(ties, trim='0.3'))

def normal(*shape, seed=0): return np.random.default_rng(seed).normal(size=shape)
def updates(shape, n, seed=0, rank=None):
    "Low rank plus noise, or low rank alone"
    rng,(out,inn) = np.random.default_rng(seed),shape
    def low(r): return rng.normal(size=(out, r))@rng.normal(size=(r, inn))
    return [low(rank) if rank else low(1)+.3*rng.normal(size=shape) for _ in range(n)]
def close(a, b, tol=1e-8):
    assert np.shape(a)==np.shape(b)
    scale = np.abs(b).max(initial=0)
    assert np.abs(np.asarray(a)-b).max(initial=0) <= tol*scale, np.abs(np.asarray(a)-b).max()/(scale or 1)
def bits(t): return t.dtype,tuple(t.shape),t.contiguous().flatten().view(torch.uint8).numpy().tobytes()
def all_bytes(d): return {o.relative_to(d).as_posix(): o.read_bytes() for o in d.rglob('*') if o.is_file()}

shapes = st.tuples(st.integers(1, 24), st.integers(1, 24))

# --- each operation, literally

def literal_ridge(ds, eps):
    ds = [d for d in ds if d.any()]
    Gs = [d.T@d/(d**2).sum() for d in ds]
    e = eps*np.trace(sum(Gs))/len(Gs[0])
    c = min(1, sum((d**2).sum() for d in ds)/(sum(ds)**2).sum())
    return (sum(d@G for d,G in zip(ds, Gs))+e*c*sum(ds)) @ np.linalg.inv(sum(Gs)+e*np.eye(len(Gs[0])))

@frugal
@given(shapes, st.integers(1, 4), st.sampled_from([None, 1, 2]), st.sampled_from([.01, .1, 1., 100.]),
    st.booleans(), st.integers(0, 99))
def test_ridge_mean(shape, n, rank, eps, with_zero, seed):
    ds = updates(shape, n, seed, rank)
    if with_zero: ds.insert(seed % (n+1), np.zeros(shape))
    close(ridge_mean(ds, eps), literal_ridge(ds, eps), 1e-7)

def test_ridge_mean_limits():
    "A large ridge is the sum, at most at its parts' norm; updates with inputs of their own are kept whole by a small one"
    ds = updates((5, 40), 3)
    c = min(1, sum((d**2).sum() for d in ds)/(sum(ds)**2).sum())
    close(ridge_mean(ds, 1e8), c*sum(ds), 1e-5)
    close(ridge_mean([ds[0], -.9*ds[0]], 1e8), .1*ds[0], 1e-5) # opposite ones are not blown up
    assert np.isfinite(ridge_mean([ds[0], -ds[0]])).all()
    ds = [np.zeros((8, 30)) for _ in range(3)]
    for i,d in enumerate(ds): d[:,10*i:10*i+10] = normal(8, 10, seed=i)
    close(ridge_mean(ds, 1e-8), sum(ds), 1e-5)
    assert ridge_mean([np.zeros((3, 4))]*2).shape==(3, 4)
    for shape in ((40, 200), (200, 40)): # rank 3, at the smallest ridge: as at a larger one
        ds = updates(shape, 2, rank=3)
        close(ridge_mean(ds, 1e-8), ridge_mean(ds, 1e-7), 1e-4)

@frugal
@given(shapes, st.integers(1, 5), st.sampled_from([None, 1, 2]), st.floats(-6, 8), st.sampled_from([1e-9, 1., 1e9]),
    st.integers(0, 99))
def test_ridge_mean_of_equal_experts(shape, k, rank, power, size, seed):
    "Equal experts are that expert at scale 1, however many and whatever the ridge"
    d = size*updates(shape, 1, seed, rank)[0]
    close(ridge_mean([d]*k, 10**power), d, 1e-8)
    close(ridge_mean([d]*k+[0*d], 10**power), d, 1e-8)

@frugal
@given(shapes, st.integers(1, 4), st.sampled_from([0., .5, .9, 1.]), st.integers(0, 99))
def test_regmean(shape, n, alpha, seed):
    ds = updates(shape, n, seed)
    Xs = [normal(shape[1], 3*shape[1], seed=seed+i) for i in range(n)]
    Gs = [X@X.T/X.shape[1] for X in Xs]
    Hs = [np.where(np.eye(shape[1]), G, alpha*G) for G in Gs]
    close(regmean(ds, Gs, alpha), sum(d@H for d,H in zip(ds, Hs))@np.linalg.inv(sum(Hs)), 1e-3)
    if alpha<1: return
    def loss(W): return sum(((W-d)@X).ravel()@((W-d)@X).ravel() for d,X in zip(ds, Xs))
    best = regmean(ds, Gs, 1)
    for i in range(5):
        assert loss(best) <= loss(best+normal(*shape, seed=i)*10.**-i)*(1+1e-9)

def test_regmean_without_inputs():
    "Dead inputs, and none at all, give the mean; asked for as many Grams as updates, finite, fitting"
    ds = updates((4, 6), 2)
    close(regmean(ds, [np.zeros((6, 6))]*2), (ds[0]+ds[1])/2)
    G = np.diag([1., 1, 1, 0, 0, 0])
    close(regmean(ds, [G, G]), (ds[0]+ds[1])/2)
    for Gs,words in (([G], '1 input Grams for 2'), ([np.eye(5)]*2, r'shape \(5, 5\), the layer takes 6'),
            ([G, G*nan], 'NaN')):
        with pytest.raises(ValueError, match=words): regmean(ds, Gs)
    with pytest.raises(ValueError, match='alpha is 1.5'): regmean(ds, [G, G], 1.5)

def literal_tsv(ds, k):
    us,ss,vs = zip(*[torch.linalg.svd(torch.from_numpy(d), full_matrices=False) for d in ds])
    def ortho(x):
        u,_,v = torch.linalg.svd(x, full_matrices=False)
        return u@v
    U,V = ortho(torch.cat([u[:,:k] for u in us], 1)),ortho(torch.cat([v[:k] for v in vs]))
    return (U@torch.diag(torch.cat([s[:k] for s in ss]))@V).numpy(),U.numpy(),V.numpy()

@pytest.mark.parametrize('n', [1, 2, 3])
@pytest.mark.parametrize('shape', [(12, 12), (12, 40), (40, 12), (13, 17), (3, 50), (2, 2)])
def test_tsv_m(shape, n):
    ds = updates(shape, n)
    k = max(1, min(shape)//n)
    want,U,V = literal_tsv(ds, k)
    got = tsv_m(ds)
    close(got, want, 1e-7)
    if n*k<=min(shape): # tasks no longer overlap
        us,ss,vs = zip(*[gram_svd(d, k) for d in ds])
        P,Q = polar(np.concatenate(us, 1)),polar(np.concatenate(vs))
        close(P.T@P, np.eye(n*k), 1e-8)
        close(Q@Q.T, np.eye(n*k), 1e-8)
        close(np.linalg.svd(got)[1][:n*k], np.sort(np.concatenate(ss))[::-1], 1e-7)
    close(tsv_m(ds, share=1/n), got)

def test_tsv_m_one_row_or_column():
    "A single direction that all share: it gets it once, at the scale of the sum's parts"
    for t in (lambda o: o, lambda o: o.T):
        got = tsv_m([t(normal(1, 9)), t(normal(1, 9, seed=1))])
        assert got.shape==t(normal(1, 9)).shape and np.isfinite(got).all()

# --- ranks

def planted(shape, k, seed=0, noise=.1):
    "An update with k strong directions"
    rng = np.random.default_rng(seed)
    u,v = (np.linalg.qr(rng.normal(size=(n, k)))[0] for n in shape)
    return u*np.linspace(30, 20, k)@v.T + rng.normal(0, noise, shape)

def test_ranks_of_updates():
    "'edge' is what `measure` counts, 1 at least; one number serves all"
    ds = [planted((40, 90), k, k) for k in (3, 7)]
    assert ranks('edge', ds)==[3, 7]==[measure(d)['n_spikes'] for d in ds]
    for low in (np.zeros((4, 5)), normal(1, 30), normal(30, 1), normal(60, 60)): assert ranks('edge', [low])==[1]
    for rank in (5, '5', '5+5'): assert ranks(rank, ds)==[5, 5]
    assert ranks('3+7', ds)==[3, 7]
    for rank in ('1+2+3', '4+4+4'):
        with pytest.raises(ValueError, match='rank is .*: pass one number for all, or 2, one per update'): ranks(rank, ds)
    with pytest.raises(ValueError, match='pass one number for all, or 1'): iso_c(ds, rank='3+7')

@pytest.mark.parametrize('text,want', [('edge', 'edge'), ('18', '18'), ('18+30', '18+30'), (' 18 + 030 ', '18+30')])
def test_rank_as_text(text, want):
    for name in ('tsv_m', 'iso_c', 'iso_cts'):
        made = operation(f'{name}(rank={text})')
        assert made.text==f'{name}(rank={want})' and operation(made.text)==made and made.settings==dict(rank=want)

@pytest.mark.parametrize('text', ['0', '-1', '1.5', '', '+', '3+', '3+0', 'edges', 'nan', '1e3', '3;4', '4+edge'])
def test_wrong_rank(text):
    with pytest.raises(ValueError) as e: operation(f'tsv_m(rank={text})')
    assert f"rank is {text!r}: pass a whole number of 1 or more" in str(e.value) and "or 'edge'" in str(e.value)
    for f in (tsv_m, iso_c, iso_cts):
        with pytest.raises(ValueError, match='rank is'): f(updates((3, 4), 2), rank=text)

@frugal
@given(shapes, st.integers(1, 4), st.lists(st.integers(1, 30), min_size=4, max_size=4), st.integers(0, 99))
def test_tsv_m_rank(shape, n, ks, seed):
    "As many of each update as asked for; the same as a share where these are equal"
    ds = updates(shape, n, seed)
    ks = ks[:n]
    us,ss,vs = zip(*[np.linalg.svd(d, full_matrices=False) for d in ds])
    def ortho(x):
        u,s,v = np.linalg.svd(x, full_matrices=False)
        return u[:,s>1e-7*s[0]]@v[s>1e-7*s[0]]
    U = np.concatenate([u[:,:k] for u,k in zip(us, ks)], 1)
    V = np.concatenate([v[:k] for v,k in zip(vs, ks)])
    s = np.concatenate([s[:k] for s,k in zip(ss, ks)])
    if all(np.linalg.cond(o)<1e6 for o in (U, V)): close(tsv_m(ds, rank='+'.join(map(str, ks))), ortho(U)*s@ortho(V), 1e-6)
    k = max(1, min(shape)//n)
    assert np.array_equal(tsv_m(ds, rank=k), tsv_m(ds))

def test_tsv_m_edge():
    ds = [planted((40, 90), k, k) for k in (3, 7)]
    got = tsv_m(ds, rank='edge')
    assert np.array_equal(got, tsv_m(ds, rank='3+7')) and np.linalg.matrix_rank(got)==10
    for words in (dict(share=.5, rank=3), dict(share=.5, rank='edge')):
        with pytest.raises(ValueError, match=r'share=0.5 and rank=.* are both given: choose one'): tsv_m(ds, **words)
    with pytest.raises(ValueError, match='both given'): operation('tsv_m(share=0.5, rank=3)')(updates=ds)

@frugal
@given(shapes, st.integers(1, 3), st.integers(1, 30), st.sampled_from([0., .3, 1.]), st.integers(0, 99))
def test_iso_c_rank(shape, n, k, beta, seed):
    ds = updates(shape, n, seed)
    u,s,v = (o[...,:k] if i<2 else o[:k] for i,o in enumerate(np.linalg.svd(sum(ds), full_matrices=False)))
    close(iso_c(ds, beta, rank=k), (u*((1-beta)*s+beta*s.mean()))@v, 1e-6)
    if k>=min(shape): assert np.array_equal(iso_c(ds, beta, rank=k), iso_c(ds, beta))

def test_iso_c_edge():
    "The sum's own edge: level where the sum has signal, nothing elsewhere"
    ds = [planted((40, 90), k, k) for k in (3, 7)]
    s = np.linalg.svd(iso_c(ds, rank='edge'))[1]
    assert measure(sum(ds))['n_spikes']==10 and np.allclose(s[:10], s[0]) and s[10]<1e-9*s[0]

def literal_cts(ds, common):
    "As the authors' code goes about it: github.com/danielm1405/iso-merging"
    r,n = min(ds[0].shape),len(ds)
    total = round((r-int(r*common))/n)*n
    k = r-total
    u,s,v = np.linalg.svd(sum(ds), full_matrices=False)
    us,ss,vs = [],[],[]
    for d in ds:
        a,b,c = np.linalg.svd(d-u[:,:k]@(u[:,:k].T@d), full_matrices=False)
        us.append(a[:,:total//n]), ss.append(b[:total//n]), vs.append(c[:total//n])
    def ortho(parts, axis):
        a,b,c = np.linalg.svd(np.concatenate(parts, axis), full_matrices=False)
        return a@c
    mean = np.concatenate([*ss, s[:k]]).mean()
    return mean*ortho([*us, u[:,:k]], 1)@ortho([*vs, v[:k]], 0)

@pytest.mark.parametrize('n', [1, 2, 3, 4])
@pytest.mark.parametrize('common', [.2, .5, .8, 1.])
@pytest.mark.parametrize('shape', [(20, 20), (20, 50), (50, 20), (33, 40)])
def test_iso_cts(shape, common, n):
    ds = [normal(*shape, seed=i) for i in range(n)]
    close(iso_cts(ds, common), literal_cts(ds, common), 1e-6)
    s = np.linalg.svd(iso_cts(ds, common))[1]
    assert np.allclose(s, s[0]) # level

def test_iso_cts_rank():
    "Only so many directions of each; no more places than they need; too many tasks leave the sum's"
    ds = [planted((40, 90), k, k) for k in (3, 7)]
    cut = [(u[:,:k]*s[:k])@v[:k] for k,(u,s,v) in zip((3, 7), map(np.linalg.svd, ds))]
    got = iso_cts(ds, rank='edge')
    close(got, iso_cts(cut, rank='3+7'), 1e-7)
    s = np.linalg.svd(got)[1]
    assert np.allclose(s[:10], s[0]) and s[10]<1e-9*s[0]
    close(iso_cts(ds, rank=1000), iso_cts(ds), 1e-7)
    few = [normal(3, 9, seed=i) for i in range(7)]
    close(iso_cts(few, common=0), iso_c(few), 1e-9)
    low = updates((20, 30), 2, rank=1)
    assert np.linalg.matrix_rank(iso_cts(low))==2 # rounding is no direction

def test_plan_with_ranks(tmp_path):
    ms,base = experts('bert', 2),bert(0)
    for rule in ('tsv_m(rank=edge)', 'tsv_m(rank=2+3)', 'iso_c(rank=edge)', 'iso_cts(common=0.5, rank=edge)'):
        plan = make_plan(rule, ms, base)
        back = Plan.load(plan.save(tmp_path/f'{rule}.csv'))
        assert back.digest==plan.digest and rule in set(back.table.op)
        k = 'bert.encoder.layer.1.output.dense.weight'
        w0,*ws = [wide(o[k]) for o in (base, *ms.values())]
        want = w0+operation(rule)(updates=[w-w0 for w in ws])
        assert np.allclose(wide(merge(back, ms, base)[k]), want, atol=1e-6)

@frugal
@given(shapes, st.integers(1, 3), st.sampled_from([0., .3, 1.]), st.integers(0, 99))
def test_iso_c(shape, n, beta, seed):
    ds = updates(shape, n, seed)
    u,s,v = np.linalg.svd(sum(ds), full_matrices=False)
    close(iso_c(ds, beta), (u*((1-beta)*s+beta*s.mean()))@v, 1e-6)

def test_shrink_mean():
    ds = updates((20, 60), 3)
    close(shrink_mean(ds), sum(shrink(d) for d in ds), 1e-12)
    assert np.linalg.norm(shrink_mean(ds)) < np.linalg.norm(sum(ds))
    for o in ((1, 5), (5, 1), (2, 2), (2, 9)): assert shrink_mean(updates(o, 2)).shape==o

def literal_ties(ds, density):
    res = np.zeros(ds[0].size)
    kept = []
    for d in ds:
        flat = d.ravel().tolist()
        n = max(1, round(len(flat)*density))
        least = sorted((abs(o) for o in flat), reverse=True)[n-1]
        kept.append([o if abs(o)>=least else 0. for o in flat])
    for i in range(len(res)):
        column = [o[i] for o in kept]
        total = sum(column)
        agree = [o for o in column if o*total>0]
        if agree: res[i] = sum(agree)/len(agree)
    return res.reshape(ds[0].shape)

@frugal
@given(shapes, st.integers(1, 4), st.sampled_from([1e-9, .1, .2, .5, 1.]), st.booleans(), st.integers(0, 99))
def test_ties(shape, n, density, coarse, seed):
    "Also where many entries are of one size, or zero"
    ds = updates(shape, n, seed)
    if coarse: ds = [np.round(d) for d in ds]
    close(ties(ds, density), literal_ties(ds, density), 1e-12)

def global_ties(tensors, density):
    "Trimmed over all tensors of a model at once, as the authors do"
    n = len(next(iter(tensors.values())))
    flat = [np.concatenate([abs(ds[i]).ravel() for ds in tensors.values()]) for i in range(n)]
    floors = [np.sort(o)[-max(1, round(len(o)*density))] for o in flat]
    return {k: ties([np.where(abs(d)>=f, d, 0) for d,f in zip(ds, floors)], 1) for k,ds in tensors.items()}

@frugal
@given(st.lists(shapes, min_size=1, max_size=4), st.integers(1, 3), st.sampled_from([.01, .2, .5, 1.]), st.booleans(),
    st.integers(0, 99))
def test_global_ties(shapes, n, density, coarse, seed):
    "Also where a tensor keeps nothing, and where many entries are of one size"
    tensors = {f'l{i}': [10.**-i*d for d in updates(s, n, seed+i)] for i,s in enumerate(shapes)}
    if coarse: tensors = {k: [np.round(d) for d in ds] for k,ds in tensors.items()}
    shares,want = trim_shares(tensors, density),global_ties(tensors, density)
    for k,ds in tensors.items():
        made = operation(f'ties(trim={shares[k]})')
        close(made(updates=ds), want[k], 1e-12)
        assert operation(made.text)==made

def test_global_ties_in_a_plan():
    ms,base = experts('bert', 2),bert(0)
    plan = make_plan('ties', ms, base, scale=.7)
    names = plan.table.name[plan.table.op.str.startswith('ties')]
    tensors = {k: [wide(m[k])-wide(base[k]) for m in ms.values()] for k in names}
    plan.table.loc[names.index, 'op'] = [f'ties(trim={o})' for o in trim_shares(tensors).values()]
    got,want = merge(plan, ms, base),global_ties(tensors, .2)
    for k in names: assert np.allclose(wide(got[k]), wide(base[k])+.7*want[k].reshape(base[k].shape), atol=1e-6)

def test_wrong_trim():
    for text,words in (('2', "trim is '2': pass a share from 0 to 1, for all updates or one for each joined by +"),
            ('0.1+x', "trim is '0.1+x'"), ('nan', "trim is 'nan'")):
        with pytest.raises(ValueError) as e: operation(f'ties(trim={text})')
        assert words in str(e.value)
    with pytest.raises(ValueError, match='one per update'): ties(updates((3, 4), 2), trim='0.1+0.2+0.3')
    with pytest.raises(ValueError, match='density is 0'): trim_shares(dict(a=updates((3, 4), 2)), 0)
    assert trim_shares(dict(a=[np.zeros((0, 3))]*2, b=updates((3, 4), 2)))['a']=='1.0+1.0'

def test_dare():
    "The share kept, the scale, the expectation; layers and models lose other entries"
    d,density = normal(400, 300),.25
    got = dare([d], density)
    kept = got!=0
    assert abs(kept.mean()-density) < 5*math.sqrt(density*(1-density)/d.size)
    close(got[kept], (d/density)[kept], 1e-12)
    small = normal(6, 7)
    mean = sum(dare([small, 2*small], density, seed=i) for i in range(4000))/4000
    assert np.abs(mean-3*small).max() < 6*np.abs(3*small).max()*math.sqrt((1/density-1)/4000)
    assert (dare([d], density, 1)!=0).tolist()!=kept.tolist()
    close(dare([d], density), got, 0)
    other = dare([normal(400, 300, seed=1)], density)!=0
    assert abs((other & kept).mean()-density**2) < .01 # another layer, another choice
    close(dare([d], 1), d, 0)

@frugal
@given(shapes, st.floats(0, 1), st.integers(0, 99))
def test_slerp_two(shape, t, seed):
    a,b = normal(*shape, seed=seed),normal(*shape, seed=seed+1000)
    b *= np.linalg.norm(a)/np.linalg.norm(b)
    angle = np.arccos(np.clip((a*b).sum()/(a*a).sum(), -1, 1))
    if angle<.01 or angle>3.1: return
    close(slerp([a, b], [1-t, t]), (np.sin((1-t)*angle)*a+np.sin(t*angle)*b)/np.sin(angle), 1e-9)

def test_slerp_more():
    "Three: as far from each, in any order; norms are averaged; equal, zero and opposite weights"
    ws = [normal(6, 8, seed=i) for i in range(3)]
    got = slerp(ws, [1, 1, 1])
    for o in ([1, 2, 0], [2, 1, 0]): close(slerp([ws[i] for i in o], [1, 1, 1]), got, 1e-10)
    near = np.eye(3)[:,None]
    close(slerp(list(near), [1, 1, 1]), np.full((1, 3), 3**-.5), 1e-10)
    norms = [np.linalg.norm(w) for w in ws]
    assert np.isclose(np.linalg.norm(slerp(ws, [1, 2, 5])), np.average(norms, weights=[1, 2, 5]))
    close(slerp(ws, [1, 2, 5]), slerp(ws, [.1, .2, .5]), 1e-12)
    close(slerp([ws[0]]*3, [1, 2, 3]), ws[0], 1e-12)
    close(slerp([ws[0], ws[1]], [1, 0]), ws[0], 1e-12)
    close(slerp([ws[0], 0*ws[0]], [1, 1]), ws[0]/2, 1e-12)
    close(slerp([2*ws[0], 4*ws[0]], [1, 1]), 3*ws[0], 1e-12)
    with pytest.raises(ValueError, match='opposite'): slerp([ws[0], -ws[0]], [1, 1])
    for mix in ([1], [-1, 2], [0, 0], [nan, 1]):
        with pytest.raises(ValueError, match='coefficients are'): slerp(ws[:2], mix)

# --- polar factors

@frugal
@given(shapes, st.integers(1, 24), st.sampled_from([1e-12, 1., 1e12]), st.integers(0, 99))
def test_polar(shape, rank, scale, seed):
    "Against the SVD, at any rank: singular values 1, and 0 where there is none"
    x = scale*normal(shape[0], rank, seed=seed)@normal(rank, shape[1], seed=seed+500)
    u,s,v = np.linalg.svd(x, full_matrices=False)
    if ((s<1e-4*s[0]) & (s>1e-12*s[0])).any(): return
    keep = s > 1e-12*s[0]
    close(polar(x), u[:,keep]@v[keep], 1e-8)
    u,s,v = gram_svd(x)
    assert (u.shape,s.shape,v.shape)==((shape[0], keep.sum()), (keep.sum(),), (keep.sum(), shape[1]))
    close((u*s)@v, x, 1e-9)
    close(s, np.linalg.svd(x)[1][:len(s)], 1e-12)
    close(v@v.T, np.eye(len(s)), 1e-8)
    close(u.T@u, np.eye(len(s)), 1e-8)

@frugal
@given(st.sampled_from([(60, 40), (40, 60), (50, 50), (90, 20), (2, 60)]), st.floats(0, 6.9), st.integers(0, 3), st.integers(0, 99))
def test_polar_of_any_condition(shape, power, kind, seed):
    "Orthonormal to 1e-8, and the nearest such matrix, up to a condition of 1e7, whatever lies between"
    k = min(shape)
    u,v = (np.linalg.qr(normal(n, k, seed=seed+i))[0] for i,n in enumerate(shape))
    low = 10**-power
    s = [np.geomspace(1, low, k), np.r_[np.ones(k-1), low], np.r_[1, np.full(k-1, low)],
        np.r_[np.ones(k-k//2), np.full(k//2, low)]][kind]
    x = u*s@v.T
    got = polar(x)
    close(got.T@got if shape[0]>=shape[1] else got@got.T, np.eye(k), 1e-8)
    close(got, u@v.T, 1e-14*10**power+2e-8)

@pytest.mark.parametrize('gap', [1e-3, 1e-5, 1e-6, 3e-7])
@pytest.mark.parametrize('n', [1, 30])
def test_polar_of_nearly_equal_bases(gap, n):
    q = np.linalg.qr(normal(200, n))[0]
    x = np.concatenate([q, q+gap*np.linalg.qr(normal(200, n, seed=1))[0]], 1)
    close(polar(x).T@polar(x), np.eye(2*n), 1e-8)
    close(polar(x.T), polar(x).T, 1e-8)

def test_svd_that_does_not_converge():
    x = np.diag([1., 1e-5])
    def fails(*_, **__): raise np.linalg.LinAlgError('SVD did not converge')
    with patch.object(np.linalg, 'svd', fails): close(polar(x), np.eye(2), 1e-8)

@pytest.mark.parametrize('gap', [1e-2, 1e-4, 1e-5, 0.])
def test_polar_of_almost_equal_bases(gap):
    "Stacked single-precision bases of two tasks that share a subspace"
    q = np.linalg.qr(normal(200, 60))[0]
    r = np.linalg.qr(q+gap*np.linalg.qr(normal(200, 60, seed=1))[0])[0]
    x = np.concatenate([q, r], 1).astype('f4')
    got = np.linalg.svd(polar(x))[1]
    assert np.isfinite(got).all()
    if gap: # in fp32 what lies below 6e-8 is rounding
        close(got, np.ones(120), 1e-3 if gap>1e-5 else .02)
        u,_,v = np.linalg.svd(x.astype('f8'), full_matrices=False)
        close(polar(x), u@v, 1e-3 if gap>1e-5 else .02)
    same = polar(np.concatenate([q, q], 1))
    close(same, np.concatenate([q, q], 1)/2**.5, 1e-7)

def test_empty():
    for o in ((0, 3), (3, 0)): assert polar(np.zeros(o)).shape==o
    assert not polar(np.zeros((3, 4))).any()

# --- what all have in common

@frugal
@given(st.sampled_from(list(of_updates)), shapes, st.integers(1, 4),
    st.sampled_from([.3, 2., 1e-12, 1e12, -1.5]), st.integers(0, 99))
def test_homogeneous(name, shape, n, c, seed):
    "A coefficient before the operation is one behind it"
    f,ds = of_updates[name],updates(shape, n, seed)
    if name=='dare': c = abs(c)
    close(f([c*d for d in ds]), c*f(ds), 1e-6)

@frugal
@given(st.sampled_from(list(of_updates)), shapes, st.integers(2, 4), st.randoms(), st.integers(0, 99))
def test_order_of_models(name, shape, n, rng, seed):
    f,ds = of_updates[name],updates(shape, n, seed)
    if name!='dare': ds = [np.float32(d) for d in ds]
    got = f(ds)
    rng.shuffle(ds)
    close(f(ds), got, 1e-6)

@pytest.mark.parametrize('name', of_updates)
def test_zero_and_extremes(name):
    f,ds = of_updates[name],updates((6, 9), 2)
    assert not f([np.zeros((6, 9))]*2).any() and f([np.zeros((6, 9))]*2).shape==(6, 9)
    for k in (-12, 12, -40, 38): assert np.isfinite(got := f([10.**k*d for d in ds])).all() and got.any()
    mixed = f([1e-12*ds[0], 1e12*ds[1]])
    assert np.isfinite(mixed).all() and f([ds[0], 0*ds[0]]).any()
    before = [d.copy() for d in ds]
    f(ds)
    for a,b in zip(ds, before): close(a, b, 0)

@pytest.mark.parametrize('text', ['ridge_mean', 'tsv_m', 'iso_c', 'shrink_mean', 'ties', 'dare', 'slerp', 'regmean'])
def test_run_operation(text):
    "Any shape; kernels as (out, in·kh·kw); the base itself where nothing was learnt"
    what = recipe(text, 'matrix')
    for shape in ((4, 3, 2, 2), (5, 6), (7,), ()):
        if len(shape)<2 and not what.rule.entrywise: continue
        W0 = np.asarray(normal(*shape) if shape else 1.3)
        ws = [W0+.1*np.random.default_rng(i).normal(size=shape) for i in (1, 2)]
        flat = [w.reshape(shape[0] if len(shape)>1 else 1, -1) for w in (W0, *ws)]
        n = flat[0].shape[1]
        grams = [np.eye(n), 2*np.eye(n)]
        ds = [c*(w-flat[0]) for c,w in zip([.5, 2.], flat[1:])]
        want = (slerp(flat[1:], [.5, 2.]) if text=='slerp' else
            flat[0]+(regmean(ds, grams) if text=='regmean' else what.rule.f(ds)))
        got = run_operation(what, ws, W0, [.5, 2.], grams)
        assert np.shape(got)==shape
        close(got, want.reshape(shape), 1e-12)
        still = run_operation(what, [W0, W0], W0, [1., 1.], grams)
        if text=='slerp': close(still, W0, 1e-12)
        else: assert np.asarray(still).tobytes()==W0.tobytes()

@pytest.mark.parametrize('workers', [1, 3])
def test_one_blas_thread(workers):
    "In all workers as long as one of them works, whoever set a limit before; then as before"
    def threads(): return {o['num_threads'] for o in threadpool_info() if o['user_api']=='blas'}
    seen,real = [],stream._whole
    def slow(row, sources):
        time.sleep(.01*len(seen)+.01)
        seen.append(threads())
        return real(row, sources)
    sds = [{f'l{j}.weight': torch.from_numpy(normal(5, 5, seed=10*i+j)) for j in range(6)} for i in range(3)]
    plan = make_plan('tsv_m', sds[1:], sds[0], heads=[])
    with threadpool_limits(2, 'blas'), patch.object(stream, '_whole', slow):
        before = threads()
        merge(plan, sds[1:], sds[0], n_workers=workers)
        assert seen==[{1}]*6 and threads()==before=={2}
        sds[1]['l3.weight'][0,0] = nan
        with pytest.raises(ValueError, match='l3.weight of a holds 1 NaN'): merge(plan, sds[1:], sds[0])
        assert threads()==before

# --- operations as text

@pytest.mark.parametrize('text,words', [('', 'unknown'), ('sum', "'sum' is unknown: choose one of 'regmean', 'ridge_mean'"),
    ('ties(', 'unknown'), ('ties)', 'unknown'), ('ties(density=.1', 'unknown'), ('ties(density=.1)x', 'unknown'),
    ('ridge_mean(.3)', "no setting '.3': it takes eps"), ('shrink_mean(eps=1)', 'it takes estimator'),
    ('slerp(mix=1)', 'it takes none'), ('regmean(grams=1)', 'it takes alpha'), ('ridge_mean(eps)', "eps is '', not a number"),
    ('ridge_mean(eps=x)', "eps is 'x', not a number"), ('ridge_mean(eps=1, eps=2)', 'gives eps twice'),
    ('ridge_mean(eps=0)', 'eps is 0.0: pass a ridge'), ('ridge_mean(eps=-1)', 'pass a ridge'),
    ('ridge_mean(eps=nan)', 'pass a ridge'), ('ridge_mean(eps=inf)', 'pass a ridge'), ('ridge_mean(eps=1e-300)', 'pass a ridge'),
    ('ties(density=0)', 'density is 0.0'), ('ties(density=1.1)', 'density is 1.1'), ('dare(density=nan)', 'density is nan'),
    ('dare(seed=-1)', 'seed is -1'), ('dare(seed=1.5)', 'not an integer'), ('tsv_m(share=0)', 'share is 0.0'),
    ('tsv_m(share=2)', 'share is 2.0'), ('iso_c(beta=nan)', 'beta is nan'), ('iso_c(beta=2)', 'beta is 2.0'),
    ('regmean(alpha=-.1)', 'alpha is -0.1')])
def test_wrong_operation(text, words):
    with pytest.raises(ValueError) as e: recipe(text, 'matrix', 'operation')
    assert words in str(e.value) and text.partition('(')[0] in str(e.value)

def operation(text): return recipe(text, 'matrix')

def test_operation_text():
    assert operation(' ridge_mean ( eps = .10 ) ').text=='ridge_mean(eps=0.1)'
    assert operation('tsv_m()').text=='tsv_m'
    assert operation('dare(seed=3, density=.5)').text=='dare(density=0.5, seed=3)'
    for o in ('regmean(alpha=0.25)', 'ties(density=1e-07)', 'dare(density=0.3, seed=12)'):
        assert operation(operation(o).text).text==o
    assert operation('dare(seed=3)').settings==dict(seed=3)
    for f,kw in ((ridge_mean, dict(eps=0)), (ties, dict(density=2)), (dare, dict(density=0)),
            (dare, dict(seed=-1)), (tsv_m, dict(share=0)), (iso_c, dict(beta=-1))):
        with pytest.raises(ValueError, match=f'{list(kw)[0]} is'): f(updates((3, 4), 2), **kw)

# --- plans

def randn(seed): return partial(torch.randn, generator=torch.Generator().manual_seed(seed))

def resnet(seed, classes=2, dtype=torch.float32):
    "As torchvision names it, small; seed 0 is the base"
    def make(seed, new):
        sd = {}
        def conv(k, o, i, n): sd[f'{k}.weight'] = new(o, i, n, n)
        def norm(k, n):
            for o in ('weight', 'bias', 'running_mean', 'running_var'): sd[f'{k}.{o}'] = new(n)
            sd[f'{k}.num_batches_tracked'] = torch.tensor(100)
        conv('conv1', 8, 3, 7)
        norm('bn1', 8)
        for l,(i,o) in enumerate([(8, 8), (8, 12)], 1):
            k = f'layer{l}.0'
            conv(f'{k}.conv1', o, i, 3), norm(f'{k}.bn1', o)
            conv(f'{k}.conv2', o, o, 3), norm(f'{k}.bn2', o)
            if i!=o: conv(f'{k}.downsample.0', o, i, 1), norm(f'{k}.downsample.1', o)
        return sd
    return expert(make, seed, dtype) | {'fc.weight': randn(seed+9)(classes, 12).to(dtype),
        'fc.bias': randn(seed+8)(classes).to(dtype)}

def bert(seed, classes=2, dtype=torch.float32, layers=2):
    "As transformers names it, small"
    def make(seed, new):
        sd = {f'bert.embeddings.{k}_embeddings.weight': new(n, 12)
            for k,n in (('word', 30), ('position', 9), ('token_type', 2))}
        sd['bert.embeddings.position_ids'] = torch.arange(9)[None]
        def linear(k, o, i): sd.update({f'{k}.weight': new(o, i), f'{k}.bias': new(o)})
        def norm(k): sd.update({f'{k}.LayerNorm.{o}': new(12) for o in ('weight', 'bias')})
        norm('bert.embeddings')
        for l in range(layers):
            k = f'bert.encoder.layer.{l}'
            for o in ('query', 'key', 'value'): linear(f'{k}.attention.self.{o}', 12, 12)
            linear(f'{k}.attention.output.dense', 12, 12), norm(f'{k}.attention.output')
            linear(f'{k}.intermediate.dense', 20, 12), linear(f'{k}.output.dense', 12, 20)
            norm(f'{k}.output')
        linear('bert.pooler.dense', 12, 12)
        return sd
    return expert(make, seed, dtype) | {'classifier.weight': randn(seed+9)(classes, 12).to(dtype),
        'classifier.bias': randn(seed+8)(classes).to(dtype)}

def expert(make, seed, dtype):
    "The base, plus an update that differs by seed"
    base,new = make(0, randn(0)),make(seed, randn(seed))
    return {k: (v+.1*new[k]*(seed>0)).to(dtype) if v.is_floating_point() else v for k,v in base.items()}

rules = ['ridge_mean(eps=0.3)', 'tsv_m', 'iso_c', 'shrink_mean', 'ties', 'dare(density=0.5)', 'slerp']
nets = dict(resnet=resnet, bert=bert)
def experts(net, n, **kw): return {f't{i}': nets[net](i, classes=1+i, **kw) for i in range(1, n+1)}
def wide(t): return t.double().numpy()

@pytest.mark.parametrize('n', [2, 3])
@pytest.mark.parametrize('net', nets)
@pytest.mark.parametrize('rule', rules)
def test_plan(rule, net, n):
    "Every tensor gets what its row says, made from the formulas"
    ms,base = experts(net, n),nets[net](0)
    plan = make_plan(rule, ms, base, scale=.7)
    got = merge(plan, ms, base)
    what = recipe(rule, 'matrix')
    assert set(got)=={f'{k}@{m}' if k.startswith(('fc', 'classifier')) else k for k in base for m in ms}
    kernels = 0
    for r in plan.table.to_dict('records'):
        k,ts = tensor_name(r['name']),[m.get(tensor_name(r['name'])) for m in ms.values()]
        t = got[r['name']]
        if r['role']=='head': want = ms[r['name'].partition('@')[2]][k]
        elif r['role']=='buffer': want = ts[0]
        elif r['role']=='matrix' or what.rule.entrywise and r['role'] in ('norm', 'bias', 'embedding'):
            assert r['op']==what.text and r['base']==(what.rule.name!='slerp') and r['t2']==.7
            kernels += t.ndim==4
            w0,*ws = [wide(o).reshape(len(o) if o.ndim>1 else 1, -1) for o in (base[k], *ts)]
            want = (slerp(ws, [1]*n) if what.rule.name=='slerp'
                else w0+what.rule.f([.7*(w-w0) for w in ws], **what.settings))
            want = torch.from_numpy(want.reshape(t.shape)).to(t.dtype)
        else:
            assert r['op']=='linear' and r['base']==0 and np.isclose(r['t1'], 1/n)
            want = torch.stack(ts).double().mean(0).to(t.dtype)
        counts = not t.is_floating_point() # integers are cut off: 99 or 100 of three times 100
        assert t.dtype==want.dtype and torch.allclose(t, want, rtol=1e-5, atol=counts or 1e-6), r['name']
    roles = set(plan.table.role[plan.table.op!='linear'])
    assert kernels==(net=='resnet')*6
    assert roles==({'matrix'} if not what.rule.entrywise else
        {'matrix', 'norm'} if net=='resnet' else {'matrix', 'norm', 'bias', 'embedding'})

def test_kernels_as_reshaped():
    "A convolution is merged as the linear layer of its (out, in·kh·kw) matrix"
    ms,base = [{'c.weight': randn(i)(6, 4, 3, 3)} for i in (1, 2)],{'c.weight': randn(0)(6, 4, 3, 3)}
    def flat(sd): return {k: v.flatten(1) for k,v in sd.items()}
    for rule in rules:
        a = merge(make_plan(rule, ms, base, heads=[]), ms, base)['c.weight']
        fs = [flat(m) for m in ms]
        b = merge(make_plan(rule, fs, flat(base), heads=[]), fs, flat(base))['c.weight']
        assert bits(a.flatten(1))==bits(b)

@pytest.mark.parametrize('rule', rules)
def test_models_equal_to_the_base(rule):
    base = bert(0, dtype=torch.bfloat16)
    got = merge(make_plan(rule, [base, base], base, heads=[]), [base, base], base)
    for k,v in base.items():
        if rule=='slerp': assert torch.allclose(got[k], v, rtol=2**-7) # norms are taken apart and put back
        else: assert bits(got[k])==bits(v), k

@pytest.mark.parametrize('rule', ['task_arithmetic', 'lines(slope=1)', 'snr_gate(tau=2, power=1.5)'])
@pytest.mark.parametrize('net', nets)
def test_plan_by_layer(rule, net):
    "Coefficients of all that is merged add up to 1 with the base's; merged like a weighted sum"
    ms,base = experts(net, 3),nets[net](0)
    plan = make_plan(rule, ms, base, scale=.4)
    t = plan.table[~plan.table.role.isin(['head', 'buffer', 'stat'])]
    assert np.allclose(t[['base', *ms]].to_numpy().sum(1), 1) and (t.op=='linear').all()
    assert (t.groupby('unit')[list(ms)].nunique()==1).all().all()
    got = merge(plan, ms, base)
    for r in t.to_dict('records'):
        want = sum(r[m]*wide(dict(ms, base=base)[m][r['name']]) for m in ('base', *ms))
        assert np.allclose(wide(got[r['name']]), want, atol=1e-5)
    if rule=='task_arithmetic': assert set(t.t1)=={.4}
    half = make_plan(rule, ms, base)
    assert half.meta['scale']==1/3 and half.digest!=plan.digest

def test_lines_by_depth(tmp_path):
    "Files list layers.10 before layers.2; depth does not"
    base = bert(0, layers=12)
    ms = {f't{i}': bert(i, layers=12) for i in (1, 2)}
    for k,sd in dict(ms, base=base).items(): save_file(sd, tmp_path/f'{k}.safetensors')
    for models,b in ((ms, base), ({k: tmp_path/f'{k}.safetensors' for k in ms}, tmp_path/'base.safetensors')):
        plan = make_plan('lines(slope=1.5)', models, b)
        t = plan.table[plan.table.role=='matrix'].set_index('name').t1
        first = [t[f'bert.encoder.layer.{i}.output.dense.weight'] for i in range(12)]
        assert first==sorted(first) and len(set(first))==12
        assert np.isclose([t.min(), t.max()], [.125, .875]).all() and t.idxmax()=='bert.pooler.dense.weight'

def test_strategies():
    assert np.allclose(task_arithmetic((2, 3), .5), [[-.5, .5, .5, .5]]*2)
    assert np.allclose(lines((3, 2), .5, 1.)[:,1], [.25, .5, .75]) and lines((1, 2)).shape==(1, 3)
    s = np.array([[1., 4.], [2, 2], [9, 1]])
    for kw in ({}, dict(power=2.), dict(tau=.1), dict(scale=1.3, tau=1e-6)):
        c = snr_gate(s, **kw)
        assert np.isfinite(c).all() and np.allclose(c.sum(1), 1)
    assert np.allclose(snr_gate(s, tau=1e9)[:,1:], .5) # the same everywhere
    assert np.isclose(snr_gate(s, .7)[0,1], .7) # the layer of the median
    c = snr_gate(s, power=100.)
    assert c[0,1]<1e-9 and np.allclose(c[1,1], c[1,2]) # the loudest, or both
    assert np.isfinite(snr_gate(np.zeros((2, 2)))).all()
    for kw,words in ((dict(tau=0), 'tau is 0'), (dict(tau=nan), 'tau is nan'), (dict(power=-1), 'power is -1'),
            (dict(power=nan), 'power is nan')):
        with pytest.raises(ValueError, match=words): snr_gate(s, **kw)
    with pytest.raises(ValueError, match='SNR is inf'): snr_gate(np.array([[inf, 1]]))

def test_tied_weights(tmp_path):
    "An output layer tied to the embedding is what the embedding is, in memory and on the disk"
    def net(seed):
        emb = randn(seed)(20, 6)
        return {'model.embed.weight': emb, 'l.weight': randn(seed+5)(6, 6), 'lm_head.weight': emb}
    ms,base = {'a': net(1), 'b': net(2)},net(0)
    for rule in ('tsv_m', 'ties', 'task_arithmetic', 'lines'):
        plan = make_plan(rule, ms, base)
        got = merge(plan, ms, base)
        assert got['lm_head.weight'].equal(got['model.embed.weight'])
        disk = load_task(merge(plan, ms, base, tmp_path/rule))
        assert {k: bits(v) for k,v in got.items()}=={k: bits(v) for k,v in disk.items()}
    assert (make_plan('tsv_m', ms, base).table.set_index('name').op[['model.embed.weight', 'lm_head.weight']]
        =='linear').all()

# --- plans in files

def test_plan_file(tmp_path):
    ms,base = experts('bert', 2),bert(0)
    digests = set()
    for i,rule in enumerate([*rules, 'regmean(alpha=0.5)', 'ridge_mean(eps=0.2)', 'ridge_mean']):
        plan = make_plan(rule, ms, base)
        back = Plan.load(plan.save(tmp_path/f'{i}.csv'))
        assert back.digest==plan.digest and back.table.op.tolist()==plan.table.op.tolist()
        assert back.meta==plan.meta and back.meta['strategy']==operation(rule).text
        digests.add(plan.digest)
        if not rule.startswith('regmean'):
            a,b = merge(plan, ms, base),merge(back, ms, base)
            assert all(bits(a[k])==bits(b[k]) for k in a)
    assert len(digests)==len(rules)+3
    text = (tmp_path/'0.csv').read_text()
    (tmp_path/'x.csv').write_text(text.replace('ridge_mean(eps=0.3)', 'ridge_mean( eps = .30 )'))
    assert Plan.load(tmp_path/'x.csv').digest==Plan.load(tmp_path/'0.csv').digest
    (tmp_path/'x.csv').write_text(text.replace('ridge_mean(eps=0.3)', 'ridge_mean(eps=0)'))
    with pytest.raises(ValueError, match='x.csv is no plan.*row .*eps is 0.0'): Plan.load(tmp_path/'x.csv')
    for odd in ('', 'sum', nan, None, 3):
        table = plan.table.copy()
        table['op'] = table.op.astype(object)
        table.loc[5, 'op'] = odd
        with pytest.raises(ValueError, match=f'row {table.name[5]!r}.*is unknown'): Plan(table, plan.meta)

def test_explain_and_diff(tmp_path):
    ms,base = experts('bert', 2),bert(0)
    a,b = (make_plan(f'ridge_mean(eps={e})', ms, base) for e in (.1, .2))
    assert 'ridge_mean(eps=0.1) of base, t1, t2 (at scale 1)' in a.explain('bert.pooler.dense')
    d = a.diff(b)
    assert (d.this=='ridge_mean(eps=0.1) of base, t1, t2').all()
    assert (d.other=='ridge_mean(eps=0.2) of base, t1, t2').all()
    assert set(d.name)==set(a.table.name[a.table.role=='matrix']) and not len(a.diff(a))
    c = a.diff(make_plan('standard', ms)).set_index('name')
    assert c.other['bert.pooler.dense.weight']=='average of t1, t2'
    assert mixture(dict(base=1., a=.5, b=0.), 'tsv_m')=='tsv_m of base, 0.5·a'
    with pytest.raises(ValueError, match='merged by ridge_mean.*spectrum-merge'):
        to_mergekit(a, dict(t1='x', t2='y'), tmp_path/'p.yml', base='z', task='t1')
    assert not list(tmp_path.iterdir())

def test_adds():
    "Which rules add updates to the base, and so need one"
    assert all(recipe(o).rule.adds and recipe(o).rule.base
        for o in [*rules, 'lines', 'snr_gate(tau=1)', ' tsv_m', 'ties (density=.1)'] if o!='slerp')
    assert not any(recipe(o).rule.adds for o in ['standard', 'snr_winner', 'base_reset', 'slerp'])
    for o in ('linear', '', 'tsv'):
        with pytest.raises(ValueError, match='is unknown'): recipe(o)


# --- folders

def write(d, net='bert', n=2, **kw):
    d.mkdir(exist_ok=True)
    for k,sd in dict(experts(net, n, **kw), base=nets[net](0, **kw)).items():
        (d/k).mkdir()
        save_file(sd, d/k/'model.safetensors')
        (d/k/'config.json').write_text(json.dumps(dict(name=k)))
    return {f't{i}': d/f't{i}' for i in range(1, n+1)},d/'base'

@pytest.mark.parametrize('net,dtype,rule', [('bert', torch.bfloat16, 'ridge_mean'), ('bert', torch.float32, 'tsv_m'),
    ('resnet', torch.bfloat16, 'iso_c'), ('resnet', torch.float32, 'shrink_mean'), ('resnet', torch.float16, 'ties'),
    ('bert', torch.float64, 'dare(seed=3)'), ('bert', torch.bfloat16, 'slerp')])
def test_memory_is_folder(net, dtype, rule, tmp_path):
    "To the bit, whatever shards, blocks and workers; nothing differs but the shards"
    models,base = write(tmp_path/'in', net, dtype=dtype)
    plan = make_plan(rule, models, base, scale=.8)
    want = merge(plan, models, base)
    sds = {k: load_file(o/'model.safetensors') for k,o in dict(models, base=base).items()}
    held = merge(plan, {k: sds[k] for k in models}, sds['base'], n_workers=2)
    assert {k: bits(v) for k,v in held.items()}=={k: bits(v) for k,v in want.items()}
    seen = {}
    for shard,workers,block,piece in ((10**9, 1, 1<<19, 1<<22), (10**9, 2, 16, 40), (2500, 1, 104, 104), (1, 2, 8, 16)):
        out = tmp_path/f'out{shard}-{workers}'
        with patch.object(stream, 'BLOCK', block), patch.object(stream, 'PIECE', piece):
            merge(plan, models, base, out, shard_size=shard, n_workers=workers)
        for task in models:
            got = load_task(out, task)
            assert {k: bits(v) for k,v in got.items()}=={tensor_name(k): bits(v) for k,v in want.items()
                if k.partition('@')[2] in ('', task)}
        seen.setdefault(shard, []).append(all_bytes(out))
        checks = verify(out, all=True)
        assert checks.ok.all() and (checks.check=='made again').sum()==len(plan.table)
    assert seen[10**9][0]==seen[10**9][1]
    text = (out/'README.md').read_text()
    assert f'{rule} of' in text or f'{rule} of 0.8' in text
    assert any(rule in o for o in checks.rule)

def test_other_types(tmp_path):
    "Models of other types than the first, and a result in a type that the user names"
    models,base = write(tmp_path/'in', dtype=torch.float32)
    half = {k: v.half() if v.is_floating_point() else v for k,v in load_file(base/'model.safetensors').items()}
    save_file(half, base/'model.safetensors')
    plan = make_plan('tsv_m', models, base)
    want = merge(plan, models, base, dtype='float64')
    out = merge(plan, models, base, tmp_path/'out', dtype='bfloat16')
    assert verify(out, all=True).ok.all()
    got = load_task(out, 't1')
    for k,v in want.items():
        if '@' in k or not v.is_floating_point(): continue
        assert v.dtype==torch.float64 and torch.allclose(got[k].double(), v, rtol=2**-8, atol=1e-30), k

def test_flipped_byte(tmp_path):
    models,base = write(tmp_path/'in', 'resnet')
    out = merge(make_plan('ridge_mean', models, base), models, base, tmp_path/'out')
    file,rng = out/'model.safetensors',random.Random(0)
    whole = file.read_bytes()
    for at in [len(whole)-1]+[rng.randrange(4096, len(whole)) for _ in range(4)]:
        data = bytearray(whole)
        data[at] ^= 1
        file.write_bytes(data)
        for kw in (dict(all=True), dict(sample=0)):
            bad = verify(out, **kw)
            assert (~bad.ok).sum()==1 and bad.tensor[~bad.ok].iloc[0]
    file.write_bytes(whole)
    text = (out/'plan.csv').read_text()
    (out/'plan.csv').write_text(text.replace('ridge_mean', 'ridge_mean(eps=0.2)'))
    assert not verify(out).ok.all()

slow = '''
import sys, time
from spectrum_merging import folder, stream
from spectrum_merging.merge import merge
from spectrum_merging.plan import make_plan
folder.FLUSH = 1
real = stream._run_piece
def slow(*a):
    time.sleep(.03)
    return real(*a)
stream._run_piece = slow
d,out = sys.argv[1:]
models,base = {k: f'{d}/{k}' for k in ('t1', 't2')},f'{d}/base'
merge(make_plan('tsv_m', models, base), models, base, out, n_workers=2)
'''

def test_kill_and_continue(tmp_path):
    "kill -9 with operations half done, five times; in the end the same bytes"
    models,base = write(tmp_path/'in')
    whole = all_bytes(merge(make_plan('tsv_m', models, base), models, base, tmp_path/'whole'))
    out,journal = tmp_path/'out',tmp_path/'.out.partial/journal'
    def start(): return subprocess.Popen([sys.executable, '-c', slow, tmp_path/'in', out])
    def lines(): return journal.read_text().count('\n') if journal.exists() else 0
    for i in range(5):
        p,had = start(),lines()
        while p.poll() is None and lines()<max(had, 1)+3: time.sleep(.005)
        p.kill()
        assert p.wait()==-9 and not out.exists() and lines()>had
    assert start().wait()==0 and all_bytes(out)==whole and not journal.exists()

def test_continues_without_doing_again(tmp_path):
    models,base = write(tmp_path/'in')
    plan = make_plan('ties', models, base)
    def stop(self): raise KeyboardInterrupt
    with patch.object(folder.Partial, 'finish', stop), pytest.raises(KeyboardInterrupt):
        merge(plan, models, base, tmp_path/'out')
    with pytest.raises(FileExistsError, match='unfinished merge of other'):
        merge(make_plan('ties(density=0.3)', models, base), models, base, tmp_path/'out')
    with patch.object(stream, '_run_piece', lambda *a: pytest.fail('did it again')):
        merge(plan, models, base, tmp_path/'out')
    assert verify(tmp_path/'out', all=True).ok.all()

def test_same_bytes_whoever_does_it(tmp_path):
    "Workers, threads of BLAS, forked or not"
    for k in ('base', 'a', 'b'):
        i = ord(k[0])
        new = randn(i)
        save_file({f'l{j}.weight': randn(0)(*s)+.1*new(*s) for j,s in
            enumerate([(300, 300), (200, 513), (600, 130)])}, tmp_path/f'{k}.safetensors')
    for rule in ('tsv_m', 'ridge_mean'):
        seen = []
        for workers,threads in ((1, 2), (2, 1), (3, 3))[:3 if rule=='tsv_m' else 2]:
            out = tmp_path/f'{rule}{workers}{threads}'
            subprocess.run([scripts/'spectrum-merge', tmp_path/'a.safetensors', tmp_path/'b.safetensors', '--base',
                tmp_path/'base.safetensors', '--strategy', rule, '--out', out, '--workers', str(workers)], check=True,
                capture_output=True, env=os.environ | dict(OMP_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads)))
            seen.append(all_bytes(out))
        assert all(o==seen[0] for o in seen[1:])
        models = {k: tmp_path/f'{k}.safetensors' for k in 'ab'} # in threads of this process
        here = merge(make_plan(rule, models, tmp_path/'base.safetensors'), models, tmp_path/'base.safetensors')
        assert {k: bits(v) for k,v in here.items()}=={k: bits(v) for k,v in load_task(out).items()}

# --- moments of inputs

def measured(base, seed):
    res = {}
    for i,(k,v) in enumerate(base.items()):
        if v.ndim<2: continue
        X = randn(seed*100+i)(v[0].numel(), 200)
        res[k] = X@X.T/200
    return res

@pytest.mark.parametrize('net', nets)
def test_grams(net, tmp_path):
    "As the formula says; a folder knows where its moments lie, and verify finds and checks them"
    models,base = write(tmp_path/'in', net)
    sds = {k: load_file(o/'model.safetensors') for k,o in dict(models, base=base).items()}
    grams = {k: measured(sds['base'], i) for i,k in enumerate(models)}
    plan = make_plan('regmean(alpha=0.8)', models, base)
    assert 'regmean(alpha=0.8)' in set(plan.table.op)
    want = merge(plan, models, base, grams=grams)
    k = 'layer2.0.conv1.weight' if net=='resnet' else 'bert.encoder.layer.1.output.dense.weight'
    w0,*ws = [wide(sds[o][k]).reshape(len(sds[o][k]), -1) for o in ('base', *models)]
    made = w0+regmean([w-w0 for w in ws], [wide(o[k]) for o in grams.values()], .8)
    assert np.allclose(wide(want[k]).reshape(made.shape), made, atol=1e-6)
    files = {}
    for m,o in grams.items():
        files[m] = tmp_path/f'grams-{m}.safetensors'
        save_file(o, files[m])
    out = merge(plan, models, base, tmp_path/'out', grams=files)
    assert all(bits(v)==bits(want[k]) for k,v in load_task(out, 't1').items() if k in want)
    told = json.loads((out/'merge.json').read_text())['inputs']
    assert set(told)=={'t1', 't2', 'base', 'grams@t1', 'grams@t2'} and told['grams@t1']['source']==str(files['t1'])
    assert verify(out, all=True).ok.all()
    moved = tmp_path/'moved'/files['t1'].name
    moved.parent.mkdir()
    files['t1'].rename(moved)
    with pytest.raises(FileNotFoundError, match='grams@t1 is not at'): verify(out)
    assert verify(out, {'grams@t1': moved}, all=True).ok.all()
    other = load_file(files['t2'])
    other[k][0,0] += 1
    save_file(other, files['t2'])
    bad = verify(out, {'grams@t1': moved}, all=True)
    assert set(bad.tensor[~bad.ok])=={'', k} and 'grams@t2: grams-t2.safetensors' in set(bad.file[~bad.ok])
    held = merge(plan, models, base, tmp_path/'held', grams=grams)
    with pytest.raises(ValueError, match='grams@t1 was merged from memory: pass it'): verify(held)
    assert verify(held, {f'grams@{m}': o for m,o in grams.items()}, all=True).ok.all()

def test_wrong_grams(tmp_path):
    models,base = experts('bert', 2),bert(0)
    plan,k = make_plan('regmean', models, base),'bert.pooler.dense.weight'
    good = {m: measured(base, i) for i,m in enumerate(models)}
    def spoilt(**kw): return good | dict(t2=good['t2'] | kw)
    for grams,words in ((None, 'needs moments of 12 inputs of t1, found none'),
            (dict(t1=good['t1']), 'needs moments of 12 inputs of t2, found none'),
            (spoilt(**{k: torch.eye(11)}), r'pooler.dense.weight needs moments of 12 inputs of t2, found \(11, 11\)'),
            (good | dict(x=good['t1']), "grams are given for 'x', the models are t1, t2"),
            (spoilt(**{k: good['t2'][k]*nan}), 'pooler.dense.weight of grams@t2 holds 144 NaN')):
        for out in (None, tmp_path/'out'):
            with pytest.raises(ValueError, match=words): merge(plan, models, base, out, grams=grams)
    assert not list(tmp_path.iterdir())
    vector = plan.table.copy()
    vector.loc[vector.name=='bert.pooler.dense.bias', ['op', 'base', 't1', 't2']] = ['regmean', 1., 1., 1.]
    with pytest.raises(PreflightError, match='dense.bias needs moments of 12 inputs of t1, found none'):
        merge(Plan(vector, plan.meta), models, base, grams=good)

# --- wrong input

@pytest.mark.parametrize('rule,kw,words', [
    ('sum', {}, "strategy 'sum' is unknown: choose one of 'standard'"), ('linear', {}, "strategy 'linear' is unknown"),
    ('standard', dict(scale=.5), "no use for 'scale'"), ('tsv_m(eps=1)', {}, "tsv_m has no setting 'eps': it takes share"),
    ('ridge_mean(eps=0)', {}, 'eps is 0.0'), ('ties(density=2)', {}, 'density is 2.0'),
    ('ties', dict(base=None), "'ties' adds updates to the base: pass base="), ('lines', dict(base=None), 'pass base='),
    ('tsv_m', dict(scale=nan), 'scale is nan'), ('lines', dict(scale=inf), 'scale is inf'),
    ('tsv_m', dict(n=1), '1 model'), ('tsv_m', dict(n=0), '0 model'), ('lines(slope=x)', {}, "slope is 'x', not a number"),
    ('lines(slope=nan)', {}, 'slope is nan: pass a finite number'), ('lines(tau=1)', {}, "lines has no setting 'tau': it takes slope"),
    ('lines(slope=1', {}, 'with settings in parentheses'), ('snr_gate(tau=0)', {}, 'tau is 0.0'), ('snr_gate(power=-1)', {}, 'power is -1'),
    ('task_arithmetic(1)', {}, 'it takes none'), ('tsv_m', dict(heads=['nowhere']), "head 'nowhere'")])
def test_wrong_rule(rule, kw, words):
    kw = dict(kw)
    models,base = list(experts('bert', 3).values())[:kw.pop('n', 2)],kw.pop('base', bert(0))
    with pytest.raises(ValueError) as e: make_plan(rule, models, base, **kw)
    assert words in str(e.value)

def edited(k, **values):
    def f(table):
        for o,v in values.items(): table.loc[table.name==k, o] = v
    return f

k = 'bert.encoder.layer.0.output.dense.weight'
@pytest.mark.parametrize('rule,edit,words', [
    ('tsv_m', edited(k, base=.5), f'{k} gets tsv_m and base 0.5'), ('tsv_m', edited(k, base=0.), 'and base 0'),
    ('tsv_m', edited(k, t1=0., t2=0.), f'{k} gets tsv_m of no model'), ('slerp', edited(k, base=1.), 'slerp with the base'),
    ('slerp', edited(k, t1=-1.), 'slerp with a coefficient below 0'),
    ('tsv_m', edited('bert.embeddings.position_ids', op='ties', base=1.), 'position_ids is no float tensor and gets ties')])
def test_edited_plan(rule, edit, words, tmp_path):
    models,base = experts('bert', 2),bert(0)
    plan = make_plan(rule, models, base)
    edit(plan.table)
    for out in (None, tmp_path/'out'):
        with pytest.raises(PreflightError) as e: merge(plan, models, base, out)
        assert words in str(e.value)
    assert not list(tmp_path.iterdir())

def test_integers_and_float8():
    "Integer tensors are not operated on, those with scales of their own are refused"
    for kind,words in ((torch.int8, 'no float tensor'), (torch.float8_e4m3fn, 'float8'), (torch.complex64, 'complex')):
        sd = {'l.weight': torch.ones(4, 4).to(kind), 'm.weight': randn(0)(4, 4)}
        table = pd.DataFrame([dict(name=k, unit=k, role='matrix', op='slerp', base=0., a=1., b=0.) for k in sd])
        with pytest.raises(PreflightError, match=words): merge(Plan(table, dict(models=['a', 'b'])), [sd, sd])
    plan = make_plan('tsv_m', experts('resnet', 2), resnet(0))
    t = plan.table.set_index('name')
    assert t.op['bn1.num_batches_tracked']==t.op['bn1.running_mean']=='linear'
    sd = {'l.weight': torch.ones(4, 4, dtype=torch.int32), 'm.weight': randn(0)(4, 4)}
    assert make_plan('ties', [sd, sd], sd, heads=[]).table.op.tolist()==['linear', 'ties']

@pytest.mark.parametrize('rule', ['tsv_m', 'slerp', 'dare', 'lines'])
@pytest.mark.parametrize('who', ['t2', 'base'])
@pytest.mark.parametrize('value', [nan, -inf])
def test_not_finite(rule, who, value, tmp_path):
    if (rule, who)==('slerp', 'base'): return
    all_ = dict(experts('bert', 2), base=bert(0))
    all_[who] = dict(all_[who], **{k: all_[who][k].clone()})
    all_[who][k][1,2] = value
    base = all_.pop('base')
    plan = make_plan(rule, all_, base)
    n = '1 NaN and 0 Inf' if value!=value else '0 NaN and 1 Inf'
    for out in (None, tmp_path/'out'):
        with pytest.raises(ValueError, match=f'{k} of {who} holds {n}'): merge(plan, all_, base, out)
    assert not list(tmp_path.iterdir())

def test_too_large_and_opposite(tmp_path):
    "What goes wrong within an operation is said of its tensor"
    sd = {'l.weight': randn(0)(4, 4).half()}
    big = {'l.weight': (60000*torch.ones(4, 4)).half()}
    with pytest.raises(ValueError, match='l.weight gets values that float16 cannot hold'):
        merge(make_plan('shrink_mean', [big, big], sd, heads=[]), [big, big], sd, tmp_path/'out')
    ms = [sd, {'l.weight': -sd['l.weight']}]
    with pytest.raises(ValueError, match='l.weight cannot get slerp: .*opposite'):
        merge(make_plan('slerp', ms, sd, heads=[]), ms, sd, tmp_path/'out')
    with pytest.raises(ValueError, match='pass base='): merge(make_plan('ties', ms, sd, heads=[]), ms)
    assert not list(tmp_path.iterdir())

# --- the command

def run(*args, ok=True):
    p = subprocess.run([scripts/args[0], *map(str, args[1:])], capture_output=True, text=True)
    assert (p.returncode==0)==ok, p.stderr
    return p.stdout if ok else p.stderr

def test_command(tmp_path):
    models,base = write(tmp_path/'in')
    given = [f'{k}={o}' for k,o in models.items()]
    text = run('spectrum-merge', *given, '--base', base, '--strategy', 'ridge_mean(eps=0.2)', '--scale', .6,
        '--out', tmp_path/'out')
    assert 'ridge_mean(eps=0.2) of base, 0.6·t1, 0.6·t2' in text
    want = merge(make_plan('ridge_mean(eps=0.2)', models, base, scale=.6), models, base, tmp_path/'here')
    assert all_bytes(want)==all_bytes(tmp_path/'out')
    text = run('spectrum-verify', tmp_path/'out', '--all')
    assert 'ridge_mean(eps=0.2) of base' in text and 'is what it says' in text
    before = {o.name for o in tmp_path.iterdir()}
    def wrong(**kw):
        with pytest.raises(Exception) as e: merge_cli(given, out=tmp_path/'o2', base=str(base), **kw)
        return str(e.value)
    for kw,words in ((dict(strategy='tsv_m(share=0)'), 'share is 0.0'), (dict(strategy='tsv_m', scale=nan), 'scale is nan'),
            (dict(strategy='tsv_m', top=3), "no use for 'top'"), (dict(strategy='ties', protocol='paper'), "no use for 'protocol'"),
            (dict(strategy='dare', estimator='spectrum'), "no use for 'estimator'"), (dict(strategy='regmean'), 'needs moments')):
        assert words in wrong(**kw)
    text = run('spectrum-merge', *given, '--base', base, '--out', tmp_path/'o2', '--strategy', 'ties(density=0)', ok=False)
    assert 'density is 0.0' in text and 'Traceback' not in text
    assert {o.name for o in tmp_path.iterdir()}==before

# --- beside mergekit

def test_as_mergekit():
    "Trimming, signs and means of its TIES; its SLERP where norms are equal"
    pytest.importorskip('mergekit')
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask
    from mergekit.merge_methods.slerp import slerp as their_slerp
    from mergekit.sparsify import SparsificationMethod, sparsify
    ds = [torch.from_numpy(d) for d in updates((40, 30), 3)]
    for density in (.1, .2, .5, 1.):
        kept = torch.stack([sparsify(d, density, SparsificationMethod.magnitude) for d in ds])
        mask = get_mask(kept, method='sum', mask_dtype=kept.dtype)
        close(ties([d.numpy() for d in ds], density), ((kept*mask).sum(0)/((kept!=0)*mask).sum(0).clamp(min=1)).numpy())
    a,b = normal(20, 30),normal(20, 30, seed=1)
    b *= np.linalg.norm(a)/np.linalg.norm(b)
    for t in (0., .3, .5, 1.):
        theirs = their_slerp(torch.tensor(t), *(torch.from_numpy(o).reshape(1, -1) for o in (a, b)))
        close(slerp([a, b], [1-t, t]), theirs.numpy().reshape(20, 30), 1e-6)

# --- numbers whose squares are none

powers = (-300, -220, -170, -150, -100, 100, 149, 152, 154, 170, 220, 300)

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('power', powers)
@pytest.mark.parametrize('shape', [(30, 80), (80, 30), (25, 25)])
@pytest.mark.parametrize('offset', [0, 2])
def test_whole_range_of_fp64(shape, power, offset):
    "The same ratios at any scale, noise level and norm in its units; nothing overflows, nobody is warned"
    W = planted(shape, 3)+offset
    here,there = spectrum(W),spectrum(W*10.**power)
    for k in ('n_spikes', 'snr', 'snr_ratio', 'stable_rank', 'effective_rank', 'ks'):
        assert getattr(there, k)==pytest.approx(getattr(here, k), rel=1e-8), k
    for k in ('sigma', 'norm'): assert getattr(there, k)/10.**power==pytest.approx(getattr(here, k), rel=1e-8), k
    root = math.sqrt(there.edge)*there.unit
    assert root/10.**power==pytest.approx(math.sqrt(here.edge), rel=1e-8)
    if abs(power)<140 or abs(power)>160: assert (there.unit==1)==(abs(power)<140)
    close(shrink(W*10.**power)/10.**power, shrink(W), 1e-8)
    for e in ('mp', 'paper_nlp', 'paper_vision', 'spectrum', 'spectrum(script=newest)'):
        assert all(v==v for v in measure(W*10.**power, e).values())
    if power>20 and shape[0]<=shape[1]: # constants do not count
        for e in ('paper_nlp', 'paper_vision'): assert measure(W*10.**power, e)['snr']==pytest.approx(measure(W, e)['snr'], rel=1e-5)

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('power', [-300, -160, 160, 300])
def test_scan_of_huge_numbers(power):
    sd = {f'l{i}.weight': torch.from_numpy(planted((20, 40), 2, i)*10.**power) for i in range(2)}
    base = {k: torch.zeros_like(v) for k,v in sd.items()}
    small = scan({k: v/10.**power for k,v in sd.items()}, progress=False)
    for of in (None, base):
        found = scan(sd, of, progress=False)
        assert np.allclose(found.snr, small.snr, rtol=1e-6) and np.isfinite(found[['edge', 'norm', 'sigma']]).all().all()

def test_script_of_spectrum():
    "The newest differs where nothing is below its threshold, and only there"
    for seed in range(20):
        W = normal(30, 30+10*seed, seed=seed)
        s = np.linalg.svd(W)[1]
        low = s <= np.subtract(*np.quantile(s, [.75, .25]))/1.349*(1+math.sqrt(30/W.shape[1]))
        want = s[~low].sum()/(s[low].sum() if low.any() else 1)/s[0]
        assert snr_spectrum(W, script='newest')==pytest.approx(want, rel=1e-9)
        assert snr_spectrum(W)==(pytest.approx(want, rel=1e-9) if low.any() else inf)
    assert measure(W, 'spectrum(script=newest)')['snr']==snr_spectrum(W, script='newest')
    with pytest.raises(ValueError, match="script is 'old': choose one of 'first', 'newest'"): measure(W, 'spectrum(script=old)')
