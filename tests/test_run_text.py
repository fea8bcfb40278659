"The text experiments as a whole, small: every table, findings, resumed from the cache, read by the panel."
import json, numpy as np, pandas as pd, pytest, subprocess, sys
from dataclasses import replace
from pathlib import Path
from spectrum_merging import run_text as rt
from spectrum_merging.explore import MergePanel
from spectrum_merging.nlp import TextBudget, generated_texts, tiny_base
from spectrum_merging.run_text import (TextBench, claim_rows, claim_table, run_text, selected, text_figures,
    text_tables)

tiny = TextBudget(steps=60, max_epochs=3, lr=2e-3, batch=32, train=480, test=80, calibration=32)
few = dict(task_arithmetic=[('task_arithmetic', .5), ('task_arithmetic', .7)],
    ridge_mean=[('ridge_mean(eps=0.1)', 1.)], tsv_m=[('tsv_m', 1.)], regmean=[('regmean(alpha=0.9)', 1.)],
    matched=[('matched', .01), ('matched', .1)])

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')

@pytest.fixture(scope='module', autouse=True)
def few_candidates():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(rt, 'text_candidates', few)
        yield

def tiny_run(cache, names, out=False, third='Emotion', **how):
    return run_text(names, out=out, budget=tiny, base=tiny_base(cache), cache=cache, progress=False,
        tasks=generated_texts([*names, third]), tops=[25, 50, 70], **how)

@pytest.fixture(scope='module')
def results(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')/'out'
    return tiny_run(cache, ('SST-2','CoLA'), out, seeds=2),out

def test_every_table(results):
    (res,out),r = results,results[0].rows
    assert set(r.table)=={'reference','paper','grid','methods','heads','one head','controls','claims','three'}
    assert set(r.seed)=={0, 1} and set(r.split.dropna())=={'validation'}
    scored = r[r.table!='claims']
    assert scored.accuracy.between(0, 1).all() and scored.mcc.between(-1, 1).all()
    sound = r[~r.table.isin(['claims','paper'])]
    assert sound.normalised.notna().all()
    own = sound[[m==f'expert {t}, own head' for m,t in zip(sound.method, sound.task)]]
    assert len(own)==4 and np.allclose(own.normalised, 1)
    assert set(r.task[r.table=='three'])=={'praise','word order','feelings'}
    paper = r[r.table=='paper']
    assert set(paper.n)=={80} and len(paper)==2*(9*2+2)
    found = text_tables(res)
    for k in ('Strategies by SNR, one head per task','Methods, one head per task','Three tasks'):
        most = 2*(3 if k=='Three tasks' else 2)
        assert (found[k][['better','worse']].sum(axis=1)<=most).all() and found[k].better.notna().any()
    assert len(found)==11 and all(len(o) for o in found.values())
    assert 'word order MCC / expert' in found['Methods, one head per task']
    assert {'paper','grid','methods','heads','controls','snr_weights','snr_updates'}==set(text_figures(res))
    names = {p.name for p in out.iterdir()}
    assert names >= {'results.csv','results.json','scans','paper.png','table-findings.csv'}
    about = json.loads((out/'results.json').read_text())
    assert about['experiment']=='sst2-cola' and len(about['rows'])==len(r)

def test_refitted_heads(cache, results):
    "Bodies stay, heads come nearer to the experts' logits on sentences that were not seen; the base is there, too"
    res = results[0]
    t = text_tables(res)['Heads refitted'].set_index('method')
    assert t.index[:2].tolist()==['base','average'] and len(t)==8
    assert t.loc['average', ['better','worse']].tolist()==[0, 0]
    shown = t["mean_normalised, experts' heads"].drop('base')
    want = text_tables(res)['Methods, one head per task'].set_index('method').mean_normalised[shown.index]
    assert np.allclose(shown, want) and np.isnan(t["mean_normalised, experts' heads"]['base'])
    three = set(res.part('three').method)
    assert {'base, heads refitted','average, heads refitted'} < three
    b = res.benches[0]
    w = b.planned(rt.make_plan('standard', b.experts, b.base))
    fitted = b.refitted(w)
    goal = {t: b.logits(b.alone(t))[t].astype('f4') for t in b.tasks}
    def far(w): return {t: np.square(z-goal[t]).mean() for t,z in b.logits(w).items()}
    before,after = far(w),far(fitted)
    assert sum(after.values()) < sum(before.values())
    for t in b.tasks:
        sd = fitted.of(t)
        assert all(v.equal(sd[k]) for k,v in w.of(t).items())
        assert not sd['classifier.weight'].equal(b.head(t)['classifier.weight'])

def test_heads_alone(cache):
    "One part by itself, with settings for some methods"
    res = tiny_run(cache, ('SST-2','Emotion'), third='CoLA', parts=['heads'],
        chosen=dict(ridge_mean=('ridge_mean(eps=0.1)', 1.), update=('snr_winner', 50)))
    assert list(text_tables(res))==['References','Heads refitted'] and 'heads' in text_figures(res)
    assert set(res.part('heads').heads)=={'refitted'} and res.part('heads').groupby('task').size().eq(4).all()

def test_other_classes_get_a_random_head(cache):
    "Emotion's head is replaced for the paper's protocol, its labels are folded; nowhere else"
    res = tiny_run(cache, ('SST-2','Emotion'), third='CoLA', parts=['paper','methods'])
    b = res.bench
    experts,labels = rt._as_published(b, 50)
    assert experts['feelings']['classifier.weight'].shape==(2, 64) and set(labels['feelings'])=={0, 1}
    assert b.experts['feelings']['classifier.weight'].shape==(6, 64)
    assert 'one head' not in set(res.rows.table) and b.mean_head is None

def test_same_again_from_cache(cache, results):
    old = {p: p.stat().st_mtime_ns for p in cache.rglob('*.npz')}
    again = tiny_run(cache, ('SST-2','CoLA'), seeds=2)
    pd.testing.assert_frame_equal(again.rows, results[0].rows)
    assert old=={p: p.stat().st_mtime_ns for p in cache.rglob('*.npz')}

def test_settings_come_from_held_out_sentences(cache, results, monkeypatch):
    "The choice does not change when validation labels do"
    b = TextBench({k: t for k,t in generated_texts(['SST-2','CoLA']).items()}, tiny, tiny_base(cache), 0, cache,
        False)
    b.labels['test'] = {k: 1-v for k,v in b.labels['test'].items()}
    assert rt.choose_text(b, rt.text_grid_rows(b, 'held'))==results[0].chosen

def test_few_tries(results, monkeypatch):
    "A budget says how many settings of each method are tried"
    b,seen = results[0].bench,[]
    monkeypatch.setattr(b, 'held_out', lambda w: seen.append(w.name) or len(seen))
    for n,want in (None, 4), (1, 0), (2, 4): # what has one setting is not tried
        seen.clear()
        monkeypatch.setattr(b, 'budget', replace(tiny, tries=n))
        found = rt.choose_text(b, [])
        assert len(seen)==len(set(seen))==want and all(v in few[k] for k,v in found.items())

def test_selected_tensors(results):
    s = selected(results[0].bench, 25)
    assert set(s.kind)=={'attention','feed-forward','norm'} and 0 < s.passes.sum() <= .3*len(s)
    assert (s[s.kind=='norm'].filter(like='snr_')==0).all(axis=None)
    noise = selected(results[0].bench, 25, rt.noise_like(results[0].bench.experts, 1))
    assert set(noise.kind[noise.passes])=={'feed-forward'}

def test_verdicts():
    def rows(ds, p=.001):
        return pd.DataFrame([dict(finding='f', how='h', task='t', better='a', worse='b', metric='mcc',
            difference=d, p=p, n=100, seed=i) for i,d in enumerate(ds)])
    for ds,want in {(.1, .11, .12): 'holds', (-.1, -.11, -.12): 'does not hold',
            (.1, -.1, .0): 'cannot be told', (.1,): 'cannot be told'}.items():
        assert claim_table(rows(ds)).verdict.tolist()==[want]
        assert rt.verdict_table(rows(ds)).verdict.tolist()==[want]

def test_one_verdict_per_finding():
    "Pairs of merges are averaged within seeds; what was published is judged apart"
    rows = pd.DataFrame([dict(finding='f', how=h, task='t', better=b, worse='plain', metric='accuracy', seed=s,
        difference=d+.01*s, p=p, n=n) for s in range(3) for h,b,d,p,n in [
            ('SNR of weights', 'x', .3, 1e-6, 900), ('SNR of update', 'x', -.1, 1e-6, 900),
            ('SNR of update', 'y', .1, .5, 900), ('as published', 'x', -.2, .5, 200)]])
    v = rt.verdict_table(rows).set_index('evidence')
    assert v.verdict.to_dict()=={'sound': 'holds', 'as published': 'does not hold'}
    assert v.loc['sound', ['comparisons','significant_for','significant_against','n','seeds']].tolist()==[9, 3, 3, 900, 3]
    assert np.isclose(v.difference['sound'], .11) and v.loc['as published', 'significant_against']==0

def test_significant_against_averaging():
    "Counted over seeds and tasks, after Holm's correction over the whole table"
    rows = pd.DataFrame([dict(method=m, seed=s, task='t', accuracy=a, p=p) for s in (0, 1)
        for m,a,p in (('average', .5, 1.), ('up', .7, 1e-4), ('down', .4, .001+.02*s), ('expert', .9, np.nan))])
    found = rt._significant(rows, ['method']).set_index('method')
    assert found.T.to_dict('list')=={'average': [0, 0], 'up': [2, 0], 'down': [0, 1]}

def test_panel_reads_it(results):
    panel = MergePanel.from_folder(results[1])
    assert panel.strategy.value=='snr_winner' and len(panel.scores)
    panel.top.value = 70
    assert panel.bn not in panel.children[0].children # there is nothing to choose
    assert panel.scores.split.eq('validation').all() and panel.scores.n.tolist()==[80]*4

def test_errors_before_any_work(cache, tmp_path):
    with pytest.raises(ValueError, match="'all' is unknown"): tiny_run(cache, ('SST-2','CoLA'), parts=['all'])
    with pytest.raises(ValueError, match='seeds is 0'): tiny_run(cache, ('SST-2','CoLA'), seeds=0)
    (tmp_path/'x').write_text('')
    with pytest.raises(FileExistsError): tiny_run(cache, ('SST-2','CoLA'), tmp_path)

def test_ready_made_experts(cache, results, tmp_path):
    "Experts by folder give what the same experts gave when trained; one with other classes is refused"
    b = results[0].bench
    again = run_text(('SST-2','CoLA'), out=False, budget=tiny, base=tiny_base(cache), cache=tmp_path,
        experts=b.folders, progress=False, tasks=generated_texts(['SST-2','CoLA']), chosen=results[0].chosen,
        parts=['methods'])
    want = results[0].part('methods').query('seed==0').accuracy.to_numpy()
    assert np.array_equal(again.part('methods').accuracy.to_numpy(), want)
    with pytest.raises(ValueError, match='has 2 classes, feelings has 6'):
        TextBench(generated_texts(['SST-2','Emotion']), tiny, tiny_base(cache), 0, cache, False,
            dict(zip(('praise','feelings'), b.folders.values())))

@pytest.mark.parametrize('args,match', [(['all','--base','x'], 'are for one experiment'),
    (['vision','--experts','SST-2=a'], 'for text experiments'),
    (['sst2-cola','--experts','SST-2=a'], 'pass SST-2=FOLDER CoLA=FOLDER'),
    (['sst2-cola','--experts','SST-2=a','CoLA=b'], 'need --base')])
def test_command_line_errors(args, match):
    p = subprocess.run([Path(sys.executable).parent/'spectrum-run', *args], capture_output=True, text=True)
    assert p.returncode and match in p.stderr
