"What returns with another seed: exact algebra, a calibrated chance level, who is compared with whom, and a whole run."
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from spectrum_merging.lab import seeds
from spectrum_merging.lab.images import ImageBudget
from spectrum_merging.lab.report import Results
from spectrum_merging.lab.run import run, signal_text, signal_vision
from spectrum_merging.lab.seeds import cut_rows, directions, drift, pooled, rank_names, regions, returned, seed_rows, without_drift
from spectrum_merging.lab.tasks import digits_tasks

@pytest.fixture
def rng(): return np.random.default_rng(0)

@pytest.mark.parametrize('shape', [(20, 50), (50, 20), (24, 24)])
def test_returned_is_the_projection(rng, shape):
    A,B = rng.standard_normal(shape),rng.standard_normal(shape)
    u,s,v = np.linalg.svd(A, full_matrices=False)
    share,z = returned(A, B)
    np.testing.assert_allclose(share, np.einsum('ik,ij,kj->k', u, B, v)/s, atol=1e-9)
    np.testing.assert_allclose(z, share*s/np.sqrt(np.einsum('ik,ij,kj->k', u**2, B**2, v**2)), atol=1e-9)
    for x,y in ((A.T, B.T), (torch.tensor(A), torch.tensor(B)), (directions(A), B)): np.testing.assert_allclose(
        returned(x, y), (share, z), atol=1e-9)
    np.testing.assert_allclose(returned(A, -3*A)[0], -3, atol=1e-8)
    np.testing.assert_allclose(returned(1e-6*A, B)[1], z, atol=1e-6)

def test_directions_that_are_not_there_are_left_out(rng):
    A = rng.standard_normal((30, 4))@rng.standard_normal((4, 60))
    d = directions(A)
    assert len(d.s)==4 and np.allclose((d.u*d.s)@d.v, A) and np.allclose(d.v@d.v.T, np.eye(4))
    assert not returned(A, np.zeros_like(A))[1].any()

@pytest.mark.parametrize('shape', [(32, 32), (32, 128), (96, 64)])
@pytest.mark.parametrize('kind', ['normal','rows','both','heavy'])
def test_chance_is_one_in_forty(rng, shape, kind):
    m,n = shape
    def noise():
        A = rng.standard_t(3, shape) if kind=='heavy' else rng.standard_normal(shape)
        if kind in ('rows','both'): A *= np.exp(rng.standard_normal((m, 1)))
        if kind=='both': A *= np.exp(rng.standard_normal((1, n)))
        return A
    found = np.mean([(returned(noise(), noise())[1]>1.96).mean() for _ in range(60)])
    assert .015<found<.035

def test_a_spike_returns_as_theory_says(rng):
    "θ c_u c_v/s of a spike in noise of variance 1/n (Benaych-Georges and Nadakuditi 2011, square and rectangular)"
    m,n,theta = 200,400,2.
    beta,share = m/n,[]
    for _ in range(12):
        u,v = (o/np.linalg.norm(o) for o in (rng.standard_normal(m), rng.standard_normal(n)))
        one,two = (theta*np.outer(u, v)+rng.standard_normal((m, n))/np.sqrt(n) for _ in range(2))
        share.append(returned(one, two)[0][0])
    s = np.sqrt((1+theta**2)*(beta+theta**2))/theta
    cu,cv = (1-beta*(1+theta**2)/(theta**2*(theta**2+beta)))**.5,(1-(beta+theta**2)/(theta**2*(theta**2+1)))**.5
    assert abs(np.mean(share)-theta*cu*cv/s)<.04

def test_drift_is_the_projection_on_the_base(rng):
    W,A = rng.standard_normal((2, 20, 30))
    own = A-(A*W).sum()/(W*W).sum()*W
    c,energy = drift(own-.3*W, W)
    assert np.isclose(c, -.3) and np.isclose(energy, .09*(W*W).sum()/(.09*(W*W).sum()+(own*own).sum()))
    assert np.allclose(without_drift(own-.3*W, W), own)
    assert drift(A, np.zeros_like(A))==(0., 0.) and drift(np.zeros_like(A), W)==(0., 0.)

def test_errors_name_the_remedy(rng):
    A,B = rng.standard_normal((8, 9)),rng.standard_normal((8, 10))
    with pytest.raises(ValueError, match='same matrix'): returned(A, B)
    with pytest.raises(ValueError, match='update of'): drift(A, B)

@pytest.mark.parametrize('k', [16, 50, 300])
def test_regions(k):
    found = regions(k, dict(flip=5, biwhiten=7, dyson=9, mp=12))
    assert (sum(found[o].astype(int) for o in rank_names())==1).all()
    for e,p in dict(flip=5, mp=12).items(): assert found[f'above {e}'].sum()==p and (found[f'above {e}']^found[f'below {e}']).all()
    assert (found['above flip'].astype(int)+found['between']+found['below both']==1).all()
    other_way = regions(k, dict(flip=12, biwhiten=7, dyson=9, mp=5))
    assert other_way['between'].sum()==7

def test_a_cut_is_what_it_would_be_by_hand(rng):
    B = rng.standard_normal((20, 40))
    A = B+rng.standard_normal((20, 40))
    d = directions(A)
    rows = pd.DataFrame(cut_rows(d, returned(d, B)[0], (B**2).sum(), dict(flip=3, mp=12))).set_index('edge')
    def by_hand(p):
        cut = (d.u[:,:p]*d.s[:p])@d.v[:p]
        factor = (cut*B).sum()/(cut*cut).sum()
        return [((cut-B)**2).sum()/(B**2).sum(), 1-((factor*cut-B)**2).sum()/(B**2).sum()]
    for e,p in dict(flip=3, mp=12, everything=20).items(): assert np.allclose(rows.loc[e, ['error','explained']].tolist(), by_hand(p))
    assert np.isclose(rows.explained['best'], max(by_hand(p)[1] for p in range(1, 21)))

def test_pooled_weighs_directions_and_sizes():
    rows = pd.DataFrame([dict(task='a', seed=0, region='r', n=1, found=1., size=1., share=.5),
        dict(task='a', seed=0, region='r', n=3, found=0., size=3., share=.1)])
    o = pooled(rows, ['region']).iloc[0]
    assert o.n==4 and o.found==.25 and np.isclose(o.share, .2)

def made_up(rng, seeds=(0, 1, 2), tasks=('a','b')):
    "Labs whose experts share their task's four directions and a tenth of the base, and nothing else"
    base = dict(layer=dict(weight=20*rng.standard_normal((32, 64))))['layer']
    W = base['weight']
    plan = {t: rng.standard_normal((32, 4))@rng.standard_normal((4, 64)) for t in tasks}
    def expert(t): return {'weight': torch.tensor(.9*W+plan[t]+rng.standard_normal(W.shape)), 'fc.weight': torch.ones(3, 32)}
    return [SimpleNamespace(seed=s, tasks=dict.fromkeys(tasks), base={'weight': torch.tensor(W)},
        experts={t: expert(t) for t in tasks}) for s in seeds]

def share_of(rows, of, kind, region='above flip'):
    rows = pd.DataFrame(rows).query("table=='returned' and of==@of and compared==@kind and region==@region")
    return pooled(rows, ['region']).share.mean()

def test_tasks_base_and_chance_are_told_apart(rng):
    rows = seed_rows(made_up(rng))
    assert share_of(rows, 'without base', 'another seed')>.6
    for kind in ('another task','mean of other tasks','random signs'): assert abs(share_of(rows, 'without base', kind))<.15
    shares = {k: share_of(rows, 'update', k, 'rank 7-12') for k in seeds.kinds}
    assert shares['mean of other tasks']>.5>abs(shares['random signs'])+.3 and shares['another seed']>.5
    multiples = [o['multiple'] for o in rows if o['table']=='drift']
    assert len(multiples)==6 and np.allclose(multiples, -.1, atol=.01)
    pairs = {(o['seed'], o['other_seed']) for o in rows if o['table']=='edges'}
    assert pairs=={(0, 1), (1, 2), (2, 0)}

def test_other_tasks_come_from_seeds_on_neither_side(rng):
    labs = made_up(rng)
    before = pd.DataFrame(seed_rows(labs))
    labs[0].experts['b']['weight'] += 100*torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    after = pd.DataFrame(seed_rows(labs))
    def mean_of_others(rows): return rows.query("task=='a' and of=='update' and compared=='mean of other tasks'").set_index(
        ['seed','region']).share
    one,two = mean_of_others(before),mean_of_others(after)
    # Seed 0 of b is on neither side of the pair 1, 2 alone.
    pd.testing.assert_series_equal(one[[0, 2]], two[[0, 2]])
    assert not np.allclose(one[1], two[1])

def test_too_few(rng):
    for labs in (made_up(rng, (0, 1)), made_up(rng, tasks=('a',))):
        with pytest.raises(ValueError, match='2 tasks and 3 seeds'): seed_rows(labs)
    for one in (signal_vision, signal_text):
        with pytest.raises(ValueError, match='seeds=3'): run(one, out=False, seeds=2)

def test_matrices_are_bodies_with_enough_directions():
    state = {'fc.weight': torch.ones(20, 64), 'conv1.weight': torch.ones(16, 3, 3, 3), 'small.weight': torch.ones(64, 9),
        'word_embeddings.weight': torch.ones(99, 64), 'bn1.weight': torch.ones(64)}
    assert seeds.matrix_names(state)==['conv1.weight']

tiny = ImageBudget(base_epochs=1, expert_steps=15, max_epochs=3, batch=64, train=320, test=100, calibration=64, width=16)

def test_a_whole_run(tmp_path):
    res = run(signal_vision, out=tmp_path/'out', tasks=digits_tasks(), budget=tiny, seeds=3, cache=tmp_path, progress=False)
    tables,figures = res.tables(),res.figures()
    assert list(tables)==[o.title for o in signal_vision.parts] and 'returned' in figures
    assert set(tables['What returns'].n)=={9} and len(tables["Drift and what is the task's own"])==9
    again = Results.load(tmp_path/'out')
    for k,o in tables.items(): pd.testing.assert_frame_equal(again.tables()[k], o)
    assert res.rows.query("table=='returned' and compared=='random signs'").found.mean()<.06
