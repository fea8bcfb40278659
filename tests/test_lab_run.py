"Whole experiments, small: every table, found again in the cache, resumed after a kill, read from their folders alone."
import hashlib, json, os, shutil, signal, subprocess, sys, time
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from spectrum_merging.evaluate import control_scans, controls, holm, mcnemar, shapley
from spectrum_merging.explore import MergePanel
from spectrum_merging.lab import inside
from spectrum_merging.lab.causes import attribution, calibrate, joint_logits
from spectrum_merging.lab.findings import claim_table, verdict_table
from spectrum_merging.lab.images import ImageBudget, Images
from spectrum_merging.lab.merges import Lab, Merge
from spectrum_merging.lab.paper import as_published, noise_like, selected
from spectrum_merging.lab.parts import choose, grid_rows, sound_strategies
from spectrum_merging.lab.report import Results, significant, summary
from spectrum_merging.lab.run import run, sst2_cola, sst2_emotion, vision
from spectrum_merging.lab.tasks import digits_tasks, generated_texts
from spectrum_merging.lab.texts import TextBudget, Texts, tiny_base

# --- Images

tiny = ImageBudget(base_epochs=1, expert_steps=30, max_epochs=3, lr=.05, batch=64, train=320, test=100,
    calibration=64, width=16)
few = dict(task_arithmetic=[('task_arithmetic', .5), ('task_arithmetic', .7)],
    ridge_mean=[('ridge_mean(eps=0.1)', 1.)], tsv_m=[('tsv_m', .8)])
chosen = {m: o[0] for m,o in few.items()} | dict(weights=('snr_winner', 50), update=('snr_max', 50))
one_grid = partial(grid_rows, split='held', tops=[50])
small_vision = replace(vision, candidates=few, grid=one_grid,
    parts=tuple(replace(o, rows=one_grid) if o.name=='grid' else o for o in vision.parts))
cheap = ['paper','grid','factorial','controls']

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')

@pytest.fixture(scope='module', autouse=True)
def one_recipe():
    "Of the experts that go far from their base, only the ordinary ones"
    with pytest.MonkeyPatch.context() as m:
        all_of_them = inside.rough_budgets
        m.setattr(inside, 'rough_budgets', lambda b: dict(list(all_of_them(b).items())[:1]))
        yield

def tiny_run(cache, parts, out=False, **how):
    return run(small_vision, out=out, tasks=digits_tasks(), budget=tiny, cache=cache, parts=parts, progress=False, **how)

def tiny_lab(cache, **tasks): return Lab(Images(), tasks or digits_tasks(), tiny, cache=cache, progress=False)

@pytest.fixture(scope='module')
def results(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')/'out'
    return tiny_run(cache, cheap, out, seeds=2, chosen=chosen),out

@pytest.fixture(scope='module')
def rest(cache): return tiny_run(cache, [o for o in small_vision.part_names() if o not in cheap] + ['factorial'])

def test_every_table(results, rest):
    (res,out),every = results,pd.concat([results[0].rows, rest.rows])
    assert set(every.table)=={'reference','paper','grid','images','barrier','variance','rough','factorial','methods',
        'heads','controls','joint','three'}
    r = every[every.table!='variance']
    assert r.normalised.notna().all() and r.accuracy.between(0, 1).all()
    assert (r.lo<=r.accuracy).all() and (r.accuracy<=r.hi).all()
    assert (rest.part('variance').ratio>0).all() and rest.part('variance').method.nunique()==3
    for t in ('reference','paper','factorial','controls'):
        assert set(res.rows.seed[res.rows.table==t])=={0, 1}
    assert set(r[r.table.isin(['grid','images','barrier'])].split)=={'held'} # never test images
    own = res.rows[(res.rows.table=='reference') & res.rows.method.str.match('expert.*own head')]
    own = own[[t in m for t,m in zip(own.task, own.method)]]
    assert len(own)==4 and np.allclose(own.normalised, 1)
    assert (res.rows.table=='factorial').sum()==2*2*2*3*4
    assert all(len(o) for part in (res, rest) for o in part.tables().values())
    assert {'paper','factorial','controls'} <= set(res.figures())
    assert {'methods','heads','images','barrier','variance'} <= set(rest.figures())
    names = {p.name for p in out.iterdir()}
    assert names >= {'results.csv','results.json','scans','factorial.png','table-factorial.csv'}
    assert all(p.stat().st_size > 5000 for p in out.glob('*.png'))

def test_settings_come_from_held_out_images(rest, cache):
    assert set(rest.chosen)=={*few, 'weights', 'update'}
    assert rest.chosen['task_arithmetic'] in few['task_arithmetic']
    assert rest.chosen['update'][0] in sound_strategies()
    with pytest.raises(ValueError, match="'all' is unknown"): tiny_run(None, ['all'])
    turned = {k: replace(t, test_y=t.test_y.flip(0)) for k,t in digits_tasks().items()}
    lab = tiny_lab(cache, **turned)
    assert choose(lab, small_vision.grid(lab), few)==rest.chosen # whatever the test labels say

def test_causes_add_up(results, rest):
    for res,n in ((results[0], 2), (rest, 1)):
        a = attribution(res)
        assert np.allclose(a.sum(axis=1), 1) and len(a)==n
    assert '+ matched layers' in attribution(rest)
    assert {'average, REPAIR','average, units aligned','matched layers'} <= set(
        rest.part('methods').method)

def test_panel_reads_it(results):
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
import sys
sys.path.insert(0, sys.argv[3])
from test_lab_run import digits_tasks, run, small_vision, tiny
run(small_vision, out=sys.argv[2], tasks=digits_tasks(), budget=tiny, cache=sys.argv[1], parts=['paper','grid'],
    chosen={}, progress=False)
'''

def test_kill_and_continue(results, cache, tmp_path):
    "Killed while predictions are written: nothing half-written, and the next run ends the same"
    shutil.copytree(cache/'models', tmp_path/'cache/models')
    p = subprocess.Popen([sys.executable, '-c', killed, tmp_path/'cache', tmp_path/'out', Path(__file__).parent])
    for _ in range(1200):
        if len(list(tmp_path.glob('cache/predictions/[!.]*.npz')))>6 or p.poll() is not None: break
        time.sleep(.05)
    p.send_signal(signal.SIGKILL)
    assert p.wait()==-signal.SIGKILL and not (tmp_path/'out').exists()
    for o in tmp_path.glob('cache/predictions/[!.]*.npz'): np.load(o, allow_pickle=False).close()
    again = tiny_run(tmp_path/'cache', ['paper','grid'], tmp_path/'out', chosen={}).rows
    want = results[0].rows.query('seed==0 and table in ["reference","paper","grid"]')
    assert np.allclose(again.accuracy, want.accuracy, atol=.05) # rounding may differ

def test_equal_merges_are_evaluated_once(cache, monkeypatch):
    "However often they are asked for, and by whichever object that says the same"
    lab,calls = tiny_lab(cache),[]
    made = Lab.states
    monkeypatch.setattr(Lab, 'states', lambda self, merged: calls.append(merged) or made(self, merged))
    for _ in range(3): lab.predict(Merge(lab.plan('task_arithmetic', scale=.123)).then('channels', 32))
    # The chain is asked for its start, and both for the one evaluation.
    assert len(calls)==2

def test_calibrated_logits():
    "A head that shouts is turned down"
    rng = np.random.default_rng(0)
    def z(loud, right): return {'a': rng.normal(0, 1, (300, 3))+4*np.eye(3)[right % 3]*(right<3)[:,None],
        'b': loud*(rng.normal(0, 1, (300, 3))+4*np.eye(3)[right % 3]*(right>=3)[:,None])}
    labels = dict(a=rng.integers(0, 3, 300), b=rng.integers(3, 6, 300))
    logits = {t: z(8., labels[t]) for t in 'ab'}
    scale = calibrate(logits, labels)
    def acc(s): return np.mean([(joint_logits(logits[t], ['a','b'], s).argmax(1)==labels[t]).mean()
        for t in 'ab'])
    assert acc(scale) > acc(None)+.1

def test_controls_keep_the_budget(results):
    scans = results[0].scans['update']
    for kind in controls:
        got = control_scans(scans, kind, 3)
        again = control_scans(scans, kind, 3)
        for t,df in got.items():
            assert df.snr.equals(again[t].snr) and df[['estimator','of']].equals(scans[t][['estimator','of']])
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

# --- Texts

tiny_text = TextBudget(steps=60, max_epochs=3, lr=2e-3, batch=32, train=480, test=80, calibration=32)
few_texts = dict(task_arithmetic=[('task_arithmetic', .5), ('task_arithmetic', .7)],
    ridge_mean=[('ridge_mean(eps=0.1)', 1.)], tsv_m=[('tsv_m', 1.)], regmean=[('regmean(alpha=0.9)', 1.)],
    matched=[('match(ridge=0.01)', None), ('match(ridge=0.1)', None)])

@pytest.fixture(scope='module')
def text_cache(tmp_path_factory): return tmp_path_factory.mktemp('texts')

def tiny_texts(cache, one, out=False, third='Emotion', names=('SST-2','CoLA'), **how):
    return run(replace(one, candidates=few_texts), out=out, budget=tiny_text, base=tiny_base(cache), cache=cache,
        progress=False, tasks=generated_texts([*names, third]), **how)

def text_lab(cache, names=('SST-2','CoLA'), budget=tiny_text, **how):
    return Lab(Texts(), generated_texts(names), budget, tiny_base(cache), 0, cache, False, **how)

@pytest.fixture(scope='module')
def text_results(text_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')/'out'
    return tiny_texts(text_cache, sst2_cola, out, seeds=2),out

def test_every_text_table(text_results):
    (res,out),r = text_results,text_results[0].rows
    assert set(r.table)=={'reference','paper','selected','grid','methods','heads','one head','controls',
        'claims','three'}
    assert set(r.seed)=={0, 1} and set(r.split.dropna())=={'validation'}
    scored = r[~r.table.isin(['claims','selected'])]
    assert scored.accuracy.between(0, 1).all() and scored.mcc.between(-1, 1).all()
    sound = r[~r.table.isin(['claims','paper','selected'])]
    assert sound.normalised.notna().all()
    own = sound[[m==f'expert {t}, own head' for m,t in zip(sound.method, sound.task)]]
    assert len(own)==4 and np.allclose(own.normalised, 1)
    assert set(r.task[r.table=='three'])=={'praise','word order','feelings'}
    paper = r[r.table=='paper']
    assert set(paper.n)=={80} and len(paper)==2*(9*2+2)
    found = res.tables()
    for k in ('Strategies by SNR, one head per task','Methods, one head per task','Three tasks'):
        most = 2*(3 if k=='Three tasks' else 2)
        assert (found[k][['better','worse']].sum(axis=1)<=most).all() and found[k].better.notna().any()
    assert len(found)==11 and all(len(o) for o in found.values())
    assert 'word order MCC' in found['Methods, one head per task']
    assert 'word order MCC / expert' in summary(res, 'methods', ['needs','method']) # empty where an expert learnt nothing
    assert {'paper','grid','methods','heads','controls','snr_weights','snr_updates'}==set(res.figures())
    names = {p.name for p in out.iterdir()}
    assert names >= {'results.csv','results.json','scans','paper.png','table-findings.csv'}
    about = json.loads((out/'results.json').read_text())
    assert about['experiment']=='sst2-cola' and len(about['rows'])==len(r)

def test_refitted_heads(text_cache, text_results):
    "Bodies stay, heads come nearer to the experts' logits on sentences that were not seen; the base is there, too"
    res = text_results[0]
    t = res.tables()['Heads refitted'].set_index('method')
    assert t.index[:2].tolist()==['base','average'] and len(t)==8
    assert t.loc['average', ['better','worse']].tolist()==[0, 0]
    shown = t["mean_normalised, experts' heads"].drop('base')
    want = res.tables()['Methods, one head per task'].set_index('method').mean_normalised[shown.index]
    assert np.allclose(shown, want) and np.isnan(t["mean_normalised, experts' heads"]['base'])
    three = set(res.part('three').method)
    assert {'base, heads refitted','average, heads refitted'} < three
    lab = text_lab(text_cache)
    average = lab.average()
    fitted = average.then('refit')
    goal = {t: lab.logits(lab.alone(t))[t][t].astype('f4') for t in lab.tasks}
    def far(m): return {t: np.square(z[t]-goal[t]).mean() for t,z in lab.logits(m).items()}
    before,after = far(average),far(fitted)
    assert sum(after.values()) < sum(before.values())
    for t in lab.tasks:
        sd = lab.states(fitted)[t]
        assert all(v.equal(sd[k]) for k,v in lab.weights(average).items() if k in sd)
        assert not sd['classifier.weight'].equal(lab.head(t)['classifier.weight'])

def test_heads_alone(text_cache):
    "One part by itself, with settings for some methods"
    res = tiny_texts(text_cache, sst2_emotion, third='CoLA', names=('SST-2','Emotion'), parts=['heads'],
        chosen=dict(ridge_mean=('ridge_mean(eps=0.1)', 1.), update=('snr_winner', 50)))
    assert list(res.tables())==['References','Heads refitted'] and 'heads' in res.figures()
    assert set(res.part('heads').heads)=={'refitted'} and res.part('heads').groupby('task').size().eq(4).all()

def test_other_classes_get_a_random_head(text_cache):
    "Emotion's head is replaced for the paper's protocol, its labels are folded; nowhere else"
    res = tiny_texts(text_cache, sst2_emotion, third='CoLA', names=('SST-2','Emotion'), parts=['paper','methods'])
    lab = text_lab(text_cache, ('SST-2','Emotion'))
    other,labels = as_published(lab, 50)
    assert other.experts['feelings']['classifier.weight'].shape==(2, 64) and set(labels['feelings'])=={0, 1}
    assert lab.experts['feelings']['classifier.weight'].shape==(6, 64)
    assert 'one head' not in set(res.rows.table)
    assert set(lab.logits(lab.average())['praise'])=={'praise','feelings'}

def test_same_texts_again_from_cache(text_cache, text_results):
    old = {p: p.stat().st_mtime_ns for p in text_cache.rglob('*.npz')}
    again = tiny_texts(text_cache, sst2_cola, seeds=2)
    pd.testing.assert_frame_equal(again.rows, text_results[0].rows)
    assert old=={p: p.stat().st_mtime_ns for p in text_cache.rglob('*.npz')}

def test_settings_come_from_held_out_sentences(text_cache, text_results):
    "The choice does not change when validation labels do"
    other = {k: replace(t, test_y=1-t.test_y) for k,t in generated_texts(['SST-2','CoLA']).items()}
    lab = Lab(Texts(), other, tiny_text, tiny_base(text_cache), 0, text_cache, False)
    assert choose(lab, sst2_cola.grid(lab), few_texts)==text_results[0].chosen

def test_few_tries(text_cache, monkeypatch):
    "A budget says how many settings of each method are tried"
    lab,seen = text_lab(text_cache),[]
    monkeypatch.setattr(lab, 'held_out', lambda m: seen.append(str(m.key)) or len(seen))
    for n,want in (None, 4), (1, 0), (2, 4): # what has one setting is not tried
        seen.clear()
        monkeypatch.setattr(lab, 'budget', replace(tiny_text, tries=n))
        found = choose(lab, [], few_texts)
        assert len(seen)==len(set(seen))==want and all(v in few_texts[k] for k,v in found.items())

def test_selected_tensors(text_cache):
    lab = text_lab(text_cache)
    s = selected(lab, 25)
    assert set(s.kind)=={'attention','feed-forward','norm'} and 0 < s.passes.sum() <= .3*len(s)
    assert (s[s.kind=='norm'].filter(like='snr_')==0).all(axis=None)
    noise = selected(lab, 25, noise_like(lab.experts, 1))
    assert set(noise.kind[noise.passes])=={'feed-forward'}

def as_results(rows, table): return Results(rows.assign(table=table), dict(experiment='none', tasks={}, seeds=[0]), {})

def test_verdicts():
    def rows(ds, p=.001):
        return pd.DataFrame([dict(finding='f', how='h', task='t', better='a', worse='b', metric='mcc',
            difference=d, p=p, n=100, seed=i) for i,d in enumerate(ds)])
    for ds,want in {(.1, .11, .12): 'holds', (-.1, -.11, -.12): 'does not hold',
            (.1, -.1, .0): 'cannot be told', (.1,): 'cannot be told'}.items():
        assert claim_table(as_results(rows(ds), 'claims')).verdict.tolist()==[want]
        assert verdict_table(as_results(rows(ds), 'claims')).verdict.tolist()==[want]

def test_one_verdict_per_finding():
    "Pairs of merges are averaged within seeds; what was published is judged apart"
    rows = pd.DataFrame([dict(finding='f', how=h, task='t', better=b, worse='plain', metric='accuracy', seed=s,
        difference=d+.01*s, p=p, n=n) for s in range(3) for h,b,d,p,n in [
            ('SNR of weights', 'x', .3, 1e-6, 900), ('SNR of update', 'x', -.1, 1e-6, 900),
            ('SNR of update', 'y', .1, .5, 900), ('as published', 'x', -.2, .5, 200)]])
    v = verdict_table(as_results(rows, 'claims')).set_index('evidence')
    assert v.verdict.to_dict()=={'sound': 'holds', 'as published': 'does not hold'}
    assert v.loc['sound', ['comparisons','significant_for','significant_against','n','seeds']].tolist()==[9, 3, 3, 900, 3]
    assert np.isclose(v.difference['sound'], .11) and v.loc['as published', 'significant_against']==0

def test_significant_against_averaging():
    "Counted over seeds and tasks, after Holm's correction over the whole table"
    rows = pd.DataFrame([dict(method=m, seed=s, task='t', accuracy=a, p=p) for s in (0, 1)
        for m,a,p in (('average', .5, 1.), ('up', .7, 1e-4), ('down', .4, .001+.02*s), ('expert', .9, np.nan))])
    found = significant(rows, ['method']).set_index('method')
    assert found.T.to_dict('list')=={'average': [0, 0], 'up': [2, 0], 'down': [0, 1]}

def test_panel_reads_texts(text_results):
    panel = MergePanel.from_folder(text_results[1])
    assert panel.strategy.value=='snr_winner' and len(panel.scores)
    panel.top.value = 70
    assert panel.bn not in panel.children[0].children # there is nothing to choose
    assert panel.scores.split.eq('validation').all() and panel.scores.n.tolist()==[80]*4

def test_errors_before_any_work(text_cache, tmp_path):
    with pytest.raises(ValueError, match="'all' is unknown"): tiny_texts(text_cache, sst2_cola, parts=['all'])
    with pytest.raises(ValueError, match='seeds is 0'): tiny_texts(text_cache, sst2_cola, seeds=0)
    (tmp_path/'x').write_text('')
    with pytest.raises(FileExistsError): tiny_texts(text_cache, sst2_cola, tmp_path)

def test_ready_made_experts(text_cache, text_results, tmp_path):
    "Experts by folder give what the same experts gave when trained; one with other classes is refused"
    folders = {t: m.path for t,m in text_lab(text_cache).modules.items()}
    again = tiny_texts(text_cache, sst2_cola, experts=folders, chosen=text_results[0].chosen, parts=['methods'])
    want = text_results[0].part('methods').query('seed==0').accuracy.to_numpy()
    assert np.array_equal(again.part('methods').accuracy.to_numpy(), want)
    fresh = run(replace(sst2_cola, candidates=few_texts), out=False, budget=tiny_text, base=tiny_base(text_cache),
        cache=tmp_path, experts=folders, progress=False, tasks=generated_texts(['SST-2','CoLA']),
        chosen=text_results[0].chosen, parts=['methods'])
    assert np.array_equal(fresh.part('methods').accuracy.to_numpy(), want)
    with pytest.raises(ValueError, match='has 2 classes, feelings has 6'):
        text_lab(text_cache, ('SST-2','Emotion'), experts=dict(zip(('praise','feelings'), folders.values())))
    with pytest.raises(ValueError, match='pass seeds=1'): tiny_texts(text_cache, sst2_cola, experts=folders, seeds=2)

# --- Both: a folder of results is all that its tables and figures need

def pictures(found):
    "`{name: hash of the picture}` as `Results.save` draws them"
    res = {}
    for k,fig in found.items():
        out = BytesIO()
        fig.savefig(out, format='png', dpi=120, bbox_inches='tight')
        res[k] = hashlib.sha256(out.getvalue()).hexdigest()
    return res

reread = '''
import json, sys
sys.path.insert(0, sys.argv[2])
from test_lab_run import Results, pictures
res = Results.load(sys.argv[1])
res.rows.to_pickle(sys.argv[3]+'/rows.pkl')
for i,(title,df) in enumerate(res.tables().items()): df.to_pickle(f'{sys.argv[3]}/{i}-{title}.pkl')
print(json.dumps(pictures(res.figures())))
'''

@pytest.mark.parametrize('which', ['results','text_results'])
def test_rebuilt_from_the_folder_alone(which, request, tmp_path):
    "A copy of the folder, a new process, an empty cache, no data: the same tables, and the same pictures byte for byte"
    res,out = request.getfixturevalue(which)
    shutil.copytree(out, tmp_path/'moved')
    (tmp_path/'new').mkdir()
    env = {k: v for k,v in os.environ.items() if k!='SPECTRUM_DATA'} | dict(SPECTRUM_CACHE=str(tmp_path/'empty'))
    p = subprocess.run([sys.executable, '-c', reread, tmp_path/'moved', Path(__file__).parent, tmp_path/'new'],
        capture_output=True, text=True, env=env, check=True)
    pd.testing.assert_frame_equal(pd.read_pickle(tmp_path/'new/rows.pkl'), res.rows, check_exact=True)
    live = res.tables()
    for i,(title,df) in enumerate(live.items()):
        pd.testing.assert_frame_equal(pd.read_pickle(tmp_path/f'new/{i}-{title}.pkl'), df, check_exact=True)
    assert len(list((tmp_path/'new').glob('*.pkl')))==len(live)+1
    drawn = json.loads(p.stdout.splitlines()[-1])
    assert drawn=={o.stem: hashlib.sha256(o.read_bytes()).hexdigest() for o in out.glob('*.png')}
    assert drawn and drawn==pictures(res.figures()) and not (tmp_path/'empty').exists()

@pytest.mark.parametrize('args,match', [(['all','--base','x'], 'are for one experiment'),
    (['vision','--experts','SST-2=a'], 'for text experiments'),
    (['sst2-cola','--experts','SST-2=a'], 'pass SST-2=FOLDER CoLA=FOLDER'),
    (['sst2-cola','--experts','SST-2=a','CoLA=b'], 'need --base')])
def test_command_line_errors(args, match):
    p = subprocess.run([Path(sys.executable).parent/'spectrum-run', *args], capture_output=True, text=True)
    assert p.returncode and match in p.stderr
