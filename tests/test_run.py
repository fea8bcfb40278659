"The vision experiment as a whole, small: every table, resumed after a kill, read by the panel."
import json, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from spectrum_merging import run
from spectrum_merging.evaluate import control_scans, controls, holm, mcnemar, shapley
from spectrum_merging.run import (Bench, Weights, _calibrate, _joint, attribution, figures,
    run_vision, tables)
from spectrum_merging.vision import Budget, digits_tasks, make_base, make_experts

tiny = Budget(base_epochs=1, expert_steps=30, max_epochs=3, lr=.05, batch=64, train=320, test=100,
    calibration=64)

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')

few = dict(task_arithmetic=[('task_arithmetic', .5), ('task_arithmetic', .7)],
    ridge_mean=[('ridge_mean(eps=0.1)', 1.)], tsv_m=[('tsv_m', .8)])
chosen = {m: o[0] for m,o in few.items()} | dict(weights=('snr_winner', 50), update=('snr_max', 50))

@pytest.fixture(scope='module', autouse=True)
def few_candidates():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(run, 'candidates', few)
        recipes = run.rough_budgets
        m.setattr(run, 'rough_budgets', lambda b: dict(list(recipes(b).items())[:1]))
        yield

def tiny_run(cache, parts, out=False, **how):
    return run_vision(out=out, tasks=digits_tasks(), budget=tiny, tops=[50], cache=cache, parts=parts,
        progress=False, **how)

cheap = ['paper','grid','factorial','controls']

@pytest.fixture(scope='module')
def results(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')/'out'
    return tiny_run(cache, cheap, out, seeds=2, chosen=chosen),out

@pytest.fixture(scope='module')
def rest(cache): return tiny_run(cache, [o for o in run.every if o not in cheap] + ['factorial'])

def test_every_table(results, rest):
    (res,out),r = results,pd.concat([results[0].rows, rest.rows])
    assert set(r.table)=={'reference','paper','grid','images','barrier','rough','factorial','methods',
        'controls','joint','three'}
    assert r.normalised.notna().all() and r.accuracy.between(0, 1).all()
    assert (r.lo<=r.accuracy).all() and (r.accuracy<=r.hi).all()
    for t in ('reference','paper','factorial','controls'):
        assert set(res.rows.seed[res.rows.table==t])=={0, 1}
    assert set(r[r.table.isin(['grid','images','barrier'])].split)=={'held'} # never test images
    own = res.rows[(res.rows.table=='reference') & res.rows.method.str.match('expert.*own head')]
    own = own[[t in m for t,m in zip(own.task, own.method)]]
    assert len(own)==4 and np.allclose(own.normalised, 1)
    assert (res.rows.table=='factorial').sum()==2*2*2*3*4
    assert all(len(o) for part in (res, rest) for o in tables(part).values())
    assert {'thresholds','factorial','controls'} <= set(figures(res))
    assert {'methods','images','barrier','variance'} <= set(figures(rest))
    names = {p.name for p in out.iterdir()}
    assert names >= {'results.csv','results.json','scans','factorial.png','table-factorial.csv'}
    assert all(p.stat().st_size > 5000 for p in out.glob('*.png'))

def test_settings_come_from_held_out_images(rest, results):
    assert set(rest.chosen)=={*few, 'weights', 'update'}
    assert rest.chosen['task_arithmetic'] in few['task_arithmetic']
    assert rest.chosen['update'][0] in run.sound_strategies
    with pytest.raises(ValueError, match="'all' is unknown"): tiny_run(None, ['all'])

def test_causes_add_up(results, rest):
    for res,n in ((results[0], 2), (rest, 1)):
        a = attribution(res)
        assert np.allclose(a.sum(axis=1), 1) and len(a)==n
    assert '+ matched layers' in attribution(rest)
    assert {'average, REPAIR','average, units aligned','matched layers'} <= set(
        rest.part('methods').method)

def test_panel_reads_it(results):
    from spectrum_merging.explore import MergePanel
    panel = MergePanel.from_folder(results[1])
    panel.strategy.value = 'snr_winner'
    assert 'digits' in panel.text.value

def test_same_again_from_cache(results, cache):
    "A second run takes everything from the cache and says the same"
    before = len(list(cache.glob('predictions/*')))
    again = tiny_run(cache, cheap, seeds=2, chosen=chosen)
    cols = ['table','seed','method','bn','task','accuracy']
    pd.testing.assert_frame_equal(again.rows[cols], results[0].rows[cols])
    assert len(list(cache.glob('predictions/*')))==before

killed = '''
import json, sys
from spectrum_merging.run import run_vision
from spectrum_merging.vision import Budget, digits_tasks
b = Budget(**json.loads(sys.argv[3]))
run_vision(out=sys.argv[2], tasks=digits_tasks(), budget=b, tops=[50], cache=sys.argv[1],
    parts=['paper','grid'], chosen={}, progress=False)
'''

def test_kill_and_continue(results, cache, tmp_path):
    "Killed while predictions are written: nothing half-written, and the next run ends the same"
    shutil.copytree(cache/'models', tmp_path/'cache/models')
    p = subprocess.Popen([sys.executable, '-c', killed, tmp_path/'cache', tmp_path/'out',
        json.dumps(vars(tiny))])
    for _ in range(1200):
        if len(list(tmp_path.glob('cache/predictions/*.npz')))>6 or p.poll() is not None: break
        time.sleep(.05)
    p.send_signal(signal.SIGKILL)
    assert p.wait()==-signal.SIGKILL and not (tmp_path/'out').exists()
    for o in tmp_path.glob('cache/predictions/*.npz'): np.load(o, allow_pickle=False).close()
    again = tiny_run(tmp_path/'cache', ['paper','grid'], tmp_path/'out', chosen={}).rows
    want = results[0].rows.query('seed==0 and table in ["reference","paper","grid"]')
    assert np.allclose(again.accuracy, want.accuracy, atol=.05) # rounding may differ

big = '''
import sys
from spectrum_merging.vision import *
t = digits_tasks()
b = Budget(base_epochs=1, expert_steps=220, max_epochs=100, batch=16)
base = make_base({k: o.limit(320) for k,o in t.items()}, b, cache=sys.argv[1], progress=False)
make_experts([(o.limit(320), b, 0) for o in t.values()], base, sys.argv[1], False)
'''

def test_children_end_with_their_parent(tmp_path):
    "Experts trained side by side: kill -9 of the parent ends the children; the rest is reused"
    p = subprocess.Popen([sys.executable, '-c', big, tmp_path])
    for _ in range(1200):
        if len(list(tmp_path.rglob('unfinished.pt')))>=2 or p.poll() is not None: break
        time.sleep(.1)
    kids = subprocess.run(['pgrep','-P',str(p.pid)], capture_output=True, text=True).stdout.split()
    assert kids
    p.kill()
    p.wait()
    for _ in range(100):
        if not any(Path(f'/proc/{k}').exists() for k in kids): break
        time.sleep(.1)
    assert not any(Path(f'/proc/{k}').exists() for k in kids)
    assert subprocess.run([sys.executable, '-c', big, tmp_path]).returncode==0
    assert len(list(tmp_path.rglob('model.safetensors')))==3

def test_child_error_is_told(tmp_path):
    tasks = {k: t.limit(96) for k,t in digits_tasks().items()}
    b = replace(tiny, expert_steps=210, max_epochs=100, lr=1e30, batch=8)
    base = make_base(tasks, tiny, cache=tmp_path, progress=False)
    with pytest.raises(ValueError, match='diverged.*lower lr'):
        make_experts([(t, b, 0) for t in tasks.values()], base, tmp_path, False, n_workers=2)

def test_equal_merges_are_evaluated_once(cache):
    b = Bench(digits_tasks(), tiny, cache=cache, progress=False)
    calls = []
    def make():
        calls.append(1)
        return b.alone('digits 0-4').body
    for _ in range(3): b.predict(Weights('counted', make))
    assert len(calls)==1

def test_calibrated_logits():
    "A head that shouts is turned down"
    rng = np.random.default_rng(0)
    def z(loud, right): return {'a': rng.normal(0, 1, (300, 3))+4*np.eye(3)[right % 3]*(right<3)[:,None],
        'b': loud*(rng.normal(0, 1, (300, 3))+4*np.eye(3)[right % 3]*(right>=3)[:,None])}
    labels = dict(a=rng.integers(0, 3, 300), b=rng.integers(3, 6, 300))
    logits = {t: z(8., labels[t]) for t in 'ab'}
    scale = _calibrate(logits, labels)
    def acc(s): return np.mean([(_joint(logits[t], ['a','b'], s).argmax(1)==labels[t]).mean()
        for t in 'ab'])
    assert acc(scale) > acc(None)+.1

def test_controls_keep_the_budget(results):
    scans = results[0].bench.update_scans
    for kind in controls:
        got = control_scans(scans, kind, 3)
        again = control_scans(scans, kind, 3)
        for t,df in got.items():
            assert df.snr.equals(again[t].snr) and df.attrs==scans[t].attrs
            assert df.snr.nunique()==len(df) and (df.name==scans[t].name).all()
    with pytest.raises(ValueError, match='choose one of'): control_scans(scans, 'best')

def test_statistics():
    rng = np.random.default_rng(0)
    y = np.zeros(2000, int)
    a,b = ((rng.random(2000) > p).astype(int)*0+(rng.random(2000) < p) for p in (.1, .1))
    assert mcnemar(a, a, y)['p']==1
    assert mcnemar((rng.random(2000)<.1), (rng.random(2000)<.2), y)['p'] < 1e-6
    ps = np.array([.001, .2, .01, .04])
    assert (holm(ps)>=ps).all() and (holm(ps)<=1).all() and holm(ps)[0]==.004
    f = frozenset
    v = {f(): 0., f('a'): 1., f('b'): 2., f('ab'): 5.}
    assert shapley(v)=={'a': 2., 'b': 3.}
    with pytest.raises(ValueError, match='no score'): shapley({f(): 0., f('ab'): 1.})
