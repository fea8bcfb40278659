"What an SNR is good for: ranks that are controls of one another, settings of another seed, verdicts that can be lost."
from dataclasses import replace
import numpy as np, pandas as pd, pytest
from spectrum_merging.lab import uses as u, verdicts as v
from spectrum_merging.lab.images import ImageBudget
from spectrum_merging.lab.merges import Lab, Merge
from spectrum_merging.lab.report import Results
from spectrum_merging.lab.run import run, where_snr
from spectrum_merging.lab.tasks import digits_tasks, generated_texts
from spectrum_merging.lab.texts import TextBudget, tiny_base

tiny = ImageBudget(base_epochs=1, expert_steps=20, max_epochs=2, lr=.05, batch=64, train=256, test=100, calibration=64, width=8)
tiny_text = TextBudget(steps=20, max_epochs=1, lr=2e-3, batch=32, train=160, test=60, calibration=32)
operations = [o.removeprefix('ranks of ') for o in dict.fromkeys(a.use for a in u.arms()) if o.startswith('ranks')]

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')

def tiny_lab(cache, seed=0): return u.open_lab(where_snr[0], seed, cache=cache, budget=tiny, tasks=digits_tasks())

@pytest.fixture(scope='module')
def lab(cache): return tiny_lab(cache)

@pytest.fixture(scope='module')
def chosen(cache):
    "Settings of shrinkage; of ranks, given"
    ranks = {a.name: (a.texts[0], 1.) for a in u.arms(2, ['ranks of tsv_m'])}
    return u.choose_settings(tiny_lab(cache, u.tuning_seed), ['shrinkage']) | {'ranks of tsv_m': ranks}

@pytest.fixture(scope='module')
def rows(cache, chosen): return pd.DataFrame([o for s in (0, 1) for o in u.use_rows(tiny_lab(cache, s), chosen)])

# --- Ranks

@pytest.mark.parametrize('operation', operations)
def test_ranks_keep_the_budget(lab, operation):
    "The controls have as many directions as the edge; permuted ones stay within their shape"
    edge,shapes = u.edge_ranks(lab, operation),u.matrices(lab)
    assert edge.shape==(len(shapes), 1 if operation=='iso_c' else 2) and (edge.max(axis=1)<=shapes.m).all()
    same = u.same_rank(lab, operation)
    assert same.to_numpy().sum()==edge.clip(lower=1).to_numpy().sum() and (same.max(axis=1)<=shapes.m).all()
    full = same.eq(shapes.m, axis=0)
    assert np.ptp(same.to_numpy()[~full.to_numpy()])<=1
    found = [u.permuted_ranks(lab, operation, d) for d in range(3)]
    for o in found:
        for _,part in shapes.groupby(['m','n']):
            assert sorted(map(tuple, o.loc[part.index].to_numpy()))==sorted(map(tuple, edge.loc[part.index].to_numpy()))
    assert found[0].equals(u.permuted_ranks(lab, operation, 0)) and not all(o.equals(edge) for o in found)

def test_energy_is_shared(lab):
    "Every layer keeps the least number of directions that holds the share"
    ranks,edge = u.energy_ranks(lab, 'tsv_m'),u.edge_ranks(lab, 'tsv_m').clip(lower=1)
    def held(k, name, t):
        d = (lab.experts[t][name]-lab.base[name]).double().flatten(1)
        e = np.linalg.svd(d.numpy(), compute_uv=False)**2
        return e[:k].sum()/e.sum()
    def shares(df): return np.array([held(df.loc[k, t], k, t) for k in df.index for t in df])
    share = shares(edge).mean()
    assert (shares(ranks)>=share-1e-6).all() and (shares((ranks-1).clip(lower=0))<share).all()

def test_even_spread():
    rng = np.random.default_rng(0)
    for _ in range(50):
        room = rng.integers(1, 9, (6, 2))
        total = int(rng.integers(12, room.sum()+1))
        found = u.spread_evenly(total, room)
        assert found.sum()==total and (found<=room).all()
        assert all(found.max()-k<=1 for k in found[found<room])

def test_a_plan_holds_ranks(lab):
    "Numbers in the rows say what the word says, and none is below 1 or above what a matrix has"
    plan = u.with_ranks(lab, 'tsv_m', u.edge_ranks(lab, 'tsv_m'), 1.)
    ops = plan.table.op[plan.table.op!='linear']
    assert ops.str.fullmatch(r'tsv_m\(rank=\d+(\+\d+)?\)').all() and '=0' not in ' '.join(ops) and plan.meta['mean_rank']>=1
    many = u.with_ranks(lab, 'tsv_m', u.fixed_ranks(lab, 'tsv_m', rank=10**6), 1.)
    assert many.digest==u.with_ranks(lab, 'tsv_m', u.fixed_ranks(lab, 'tsv_m', rank=10**7), 1.).digest

@pytest.mark.parametrize('operation', operations)
def test_numbers_say_what_edge_says(lab, operation):
    by_word = lab.weights(Merge(lab.plan(f'{operation}(rank=edge)')))
    by_number = lab.weights(Merge(u.with_ranks(lab, operation, u.edge_ranks(lab, operation), 1.)))
    for k,w in by_word.items(): assert np.allclose(w, by_number[k], atol=1e-6), k

# --- Settings and scores

def test_equal_effort():
    "All arms of a use search the same numbers; those that go by scores the same recipes"
    for n in (2, 3):
        for use in {a.use for a in u.arms(n)}:
            found = [a for a in u.arms(n, [use]) if a.name!='average']
            assert len({a.numbers for a in found})==1
            assert len({a.texts for a in found if a.name!='the same λ'})==1 or use=='shrinkage'
            assert found[0].role=='measure'
    assert not any('low' in t for a in u.arms(3) for t in a.texts)

def test_other_machines_make_the_same_plans(lab, monkeypatch):
    "The last digits of an SNR make no other merge"
    def plan(): return u.guided_plan(lab, 'snr_weighted', 50).digest
    before,scans = plan(),lab.scans('update', u.new)
    monkeypatch.setattr(Lab, 'scans', lambda *_, **__: {t: o.assign(snr=o.snr*(1+1e-12)) for t,o in scans.items()})
    assert plan()==before

def test_settings_come_from_another_seed(cache, lab, chosen, monkeypatch):
    with pytest.raises(ValueError, match='score others'): u.tuned_rows(tiny_lab(cache, u.tuning_seed))
    seen,held = set(),Lab.held_out
    def watched(self, merged):
        seen.add(self.seed)
        return held(self, merged)
    monkeypatch.setattr(Lab, 'held_out', watched)
    found = u.tuned_rows(lab, uses=['shrinkage'])
    assert seen=={u.tuning_seed} and {r['split'] for r in found}!={'held'}
    assert {r['method']: (r['setting'], r['number']) for r in found}==chosen['shrinkage']
    assert u.tuned_rows(lab, uses=['shrinkage'])==found and seen=={u.tuning_seed}

def test_rows_are_paired(rows):
    first = rows[rows.role=='measure']
    assert (first.gain==0).all() and (first.p==1).all()
    own = first.set_index(['use','seed','task']).kept
    gain = [own[r.use, r.seed, r.task]-r.kept for r in rows.itertuples()]
    assert np.allclose(gain, rows.gain) and (rows.gain_lo<=rows.gain+1e-12).all() and (rows.gain<=rows.gain_hi+1e-12).all()
    assert set(rows.draw[rows.role=='permuted'])=={0, 1, 2} and rows.split.nunique()==1

def test_scored_in_pieces(cache, lab, chosen, rows):
    "What another process put into the cache is what the rows are made of"
    before = len(list(cache.glob('predictions/*')))
    one = where_snr[0]
    n = u.score(one, 0, chosen, cache=cache, budget=tiny, tasks=digits_tasks())
    assert len(list(cache.glob('predictions/*')))==before and n==rows[rows.seed==0].groupby(['use','method','draw']).ngroups

# --- Verdicts

def test_tables(rows):
    table,every = v.use_table(rows),v.use_differences(rows)
    assert len(table)==rows.use.nunique() and set(table.verdict)<={'wins','ties','loses'}
    assert every.arm.str.contains('hindsight').sum()==1 and (every.lo<=every.difference).all()
    assert all(o in v.use_text(table) for o in table.use) and len(v.plot_uses(rows).axes)==1

@pytest.mark.parametrize('worth, says', [([.02, .02], 'wins'), ([-.02, -.02], 'loses'), ([.02, -.02], 'ties'), ([.009, .02], 'ties')])
def test_verdicts(worth, says): assert v.verdict_of([(d, d-.005, d+.005) for d in worth])==says

def test_an_interval_that_holds_zero_is_no_verdict():
    assert v.verdict_of([(.05, -.001, .1), (.05, .01, .09)])=='ties'
    assert v.verdict_of([(-.05, -.1, .001)])==v.verdict_of([(.05, np.nan, np.nan)])=='ties'

def test_texts_and_three_tasks(tmp_path, monkeypatch):
    "As an experiment of two and of three tasks, from its folder alone"
    some = [a for a in u.arms(3) if a.use=='gate']
    monkeypatch.setattr(u, 'arms', lambda n=2, uses=None: [replace(a, texts=a.texts[:1], numbers=(.4, .6), draws=1) for a in some
        if a.name!='the same λ'][:3] + [replace(a, numbers=(.4, .6)) for a in some if a.name=='the same λ'])
    res = run(where_snr[1], out=tmp_path/'out', budget=tiny_text, base=tiny_base(tmp_path), cache=tmp_path, progress=False,
        tasks=generated_texts(['SST-2','CoLA','Emotion']))
    again = Results.load(tmp_path/'out')
    table = again.tables()['Where SNR earns its keep']
    assert len(table)==2 and sorted(o.count('+') for o in table.study)==[1, 2] and (tmp_path/'out/uses.png').exists()
    assert 'three' not in [o.name for o in where_snr[2].parts]
