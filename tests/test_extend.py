"What the page *Extend it* adds, one cell each, works in every part of an experiment; no module is touched."
import json
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from spectrum_merging.checkpoint import Checkpoint
from spectrum_merging.lab import causes, parts as p, report
from spectrum_merging.lab.merges import Lab, Merge
from spectrum_merging.lab.report import Experiment, Part, Results, experiments
from spectrum_merging.lab.run import run
from spectrum_merging.merge import load_task, merge, task_state
from spectrum_merging.plan import Plan, make_plan
from spectrum_merging.rules import recipe, rule, rules
from spectrum_merging.scan import scan
from spectrum_merging.verify import verify

page = Path(__file__).parent.parent/'nbs/tutorials/01_extend.ipynb'

@pytest.fixture(scope='module')
def added():
    "All that the page's cells define; rules and experiments are forgotten afterwards"
    cells = [''.join(c['source']) for c in json.loads(page.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
    known,threads,names = (dict(rules), dict(experiments)),torch.get_num_threads(),dict(__name__='extend')
    torch.set_num_threads(1)
    for text in cells: exec(compile(text, page.name, 'exec'), names)
    yield names
    torch.set_num_threads(threads)
    for store,before in zip((rules, experiments), known):
        store.clear()
        store.update(before)

def test_one_cell_each(added):
    "Each extension is whole in the cell that defines it"
    cells = [''.join(c['source']) for c in json.loads(page.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
    for word in ('def loudness','def snr_lean','def by_use','def recentre','class Vectors(Kind)','vectors = experiment('):
        assert sum(word in o for o in cells)==1
    assert {k: rules[k].kind for k in ('loudness','snr_lean','by_use','recentre')}==dict(loudness='estimator',
        snr_lean='layer', by_use='matrix', recentre='repair')

def test_to_disk_and_back(added, tmp_path):
    "A new operation and a new strategy: same plan from its file, same tensors in a folder, which verifies"
    models,start,grams = (added[k] for k in ('models','start','grams'))
    for text,how in ('by_use', dict(scale=.7)), ('snr_lean(trust=0.8)', dict(estimator='loudness(power=1)', top=50)):
        plan = make_plan(text, models, start, **how)
        plan.save(tmp_path/f'{text[:4]}.csv')
        assert Plan.load(tmp_path/f'{text[:4]}.csv').digest==plan.digest
        given = dict(grams=grams) if text=='by_use' else {}
        memory = merge(plan, models, start, **given)
        out = merge(plan, models, start, out=tmp_path/text[:4], **given)
        for t in models:
            found = load_task(out, t)
            assert all(v.equal(found[k]) for k,v in task_state(memory, t).items())
    assert scan(models['front'], start, estimator='loudness').estimator.eq('loudness').all()

def test_errors_know_what_was_added(added):
    models,start = added['models'],added['start']
    with pytest.raises(ValueError, match='snr_lean'): make_plan('snr_leen', models, start)
    with pytest.raises(ValueError, match='loudness'): scan(models['front'], estimator='loud')
    with pytest.raises(ValueError, match='recentre'): Merge('base').then('recenter')
    with pytest.raises(ValueError, match='would replace it'): rule('layer', name='snr_lean')(lambda shape: None)

def every_part():
    "The parts that serve every kind of network"
    return (Part('reference', partial(p.reference_rows, everywhere=True, together=True), ('method',), 'References'),
        Part('grid', partial(p.grid_rows, tops=[50]), ('strategy','of','top'), 'Strategies', causes.plot_grid),
        Part('factorial', causes.factorial_rows, ('method','heads'), 'Factorial', causes.plot_factorial),
        Part('causes', shows='factorial', title='What causes the collapse', table=causes.attribution_table),
        Part('methods', p.method_rows, title='Methods', figure=causes.plot_methods_by_task,
            table=partial(causes.method_table, by=['needs','method'])),
        Part('heads', p.head_rows, title='Heads refitted', figure=causes.plot_heads, table=causes.head_table),
        Part('one head', by=('method',), title='Methods, one averaged head'),
        Part('controls', p.control_rows, title='Controls', figure=causes.plot_controls, table=p.control_table),
        Part('joint', causes.joint_rows, ('method','logits'), 'One output for all classes'),
        Part('three', p.three_rows, ('method',), 'Three tasks', wide=True, once=True))

few = dict(task_arithmetic=[('task_arithmetic', s) for s in (.3, .5)], ridge_mean=[('ridge_mean(eps=0.1)', 1.)],
    by_use=[('by_use', s) for s in (.8, 1.2)], slerp=[('slerp', .5)],
    matched=[('match(ridge=0.01)', None), ('match(ridge=0.1)', None)], recentre=[('recentre', None)])

@pytest.fixture(scope='module')
def whole(added, tmp_path_factory):
    "An experiment of every generic part, for a kind that no module knows"
    tmp = tmp_path_factory.mktemp('extend')
    third = added['teacher']('third', 5)
    one = replace(added['vectors'], name='every part', parts=every_part(), candidates=few,
        third=lambda pair, root: pair | {third.name: third}, wide_methods=('ridge_mean','by_use','matched'))
    return one,run(one, out=tmp/'out', seeds=2, cache=tmp/'cache', progress=False),tmp

def test_every_generic_part(whole):
    one,res,_ = whole
    assert res.have=={'reference','grid','factorial','methods','heads','one head','controls','joint','three'}
    assert res.rows.accuracy.between(0, 1).all() and res.rows.normalised.notna().all() and 'bn' not in res.rows
    assert set(res.part('grid').strategy)>={'snr_lean','snr_winner','standard'}
    assert {'by_use','recentre'}<set(res.chosen) and any('by_use' in o for o in res.part('methods').method)
    assert set(res.part('methods').needs)=={'weights','unlabelled vectors'}
    assert set(res.part('three').task)=={'front','back','third'} and set(res.part('three').seed)=={0}
    assert len(res.part('factorial'))==2*2*4*2 # tasks, heads, weights, seeds
    own = res.part('reference')[lambda o: [m==f'expert {t}, own head' for m,t in zip(o.method, o.task)]]
    assert np.allclose(own.normalised, 1)
    titles = {o.title for o in one.parts if o.title}-{'What causes the collapse'} # statistics are no cause here
    assert set(res.tables(one))==titles and all(len(o) for o in res.tables(one).values())
    want = {o.name for o in one.parts if o.figure} | {'snr_weights','snr_updates'}
    assert set(res.figures(one))==want

def drawn(found):
    res = {}
    for k,fig in found.items():
        out = BytesIO()
        fig.savefig(out, format='png', dpi=120, bbox_inches='tight')
        res[k] = out.getvalue()
    plt.close('all')
    return res

def test_saved_and_loaded(whole):
    "The same numbers, tables, and pictures to the last byte"
    one,res,tmp = whole
    again = Results.load(tmp/'out')
    pd.testing.assert_frame_equal(again.rows, res.rows, check_exact=True)
    live,back = res.tables(one),again.tables(one)
    assert list(live)==list(back)
    for k in live: pd.testing.assert_frame_equal(back[k], live[k], check_exact=True)
    pictures = drawn(again.figures(one))
    assert pictures==drawn(res.figures(one))
    assert pictures=={o.stem: o.read_bytes() for o in (tmp/'out').glob('*.png')}
    with pytest.raises(ValueError, match="'every part' is unknown here: pass it"): again.tables()

def test_found_in_the_cache(whole):
    one,res,tmp = whole
    before = {o: o.stat().st_mtime_ns for o in tmp.rglob('*.npz')}
    again = run(one, out=False, seeds=2, cache=tmp/'cache', progress=False)
    pd.testing.assert_frame_equal(again.rows, res.rows)
    assert {o: o.stat().st_mtime_ns for o in tmp.rglob('*.npz')}==before
