"Rules by name: what they may ask for, their settings, their text; a rule of one's own from plan to proof."
import importlib, numpy as np, pandas as pd, pytest, torch
from safetensors.torch import save_file
from spectrum_merging import strategies
from spectrum_merging.merge import load_task, merge
from spectrum_merging.plan import Plan, make_plan
from spectrum_merging.preflight import PreflightError
from spectrum_merging.rules import Choice, Range, Recipe, Rule, asked, recipe, rule, rule_names, rules
from spectrum_merging.scan import scan
from spectrum_merging.edges import snr
from spectrum_merging.verify import verify

@pytest.fixture(autouse=True)
def only_here():
    "Rules that a test adds are gone after it"
    before = dict(rules)
    yield
    rules.clear()
    rules.update(before)

ours = dict(
    layer=['standard','base_reset','snr_winner','snr_lowA','snr_lowB','snr_max','snr_weighted','task_arithmetic','lines',
        'snr_gate'],
    matrix=['regmean','ridge_mean','tsv_m','iso_c','iso_cts','shrink_mean','ties','dare','slerp'],
    estimator=['mp','paper_nlp','paper_vision','spectrum','flip','biwhiten','dyson'])

def test_ours():
    for kind,names in ours.items(): assert rule_names(kind)[:len(names)]==names
    assert rule_names('layer', 'matrix')==rule_names('layer')+rule_names('matrix')
    assert {k for k,o in rules.items() if o.two_only}=={'snr_lowA', 'snr_lowB'}
    assert {k for k in rule_names('layer', 'matrix') if not rules[k].base}=={'standard', 'snr_winner', 'snr_lowA',
        'snr_lowB', 'snr_max', 'snr_weighted', 'slerp'}
    assert {k for k in rule_names('matrix') if rules[k].homogeneous}=={*ours['matrix']}-{'slerp'}
    assert {k for k in rule_names('matrix') if rules[k].entrywise}=={'ties', 'dare', 'slerp'}
    assert {k for k in rule_names('matrix') if rules[k].asks('grams')}=={'regmean'}
    assert all(recipe(k).text==k and recipe(k).version==dict(ridge_mean=2, shrink_mean=2, mp=2, flip=4).get(k, 1) for o in ours.values() for k in o)

# --- settings

def test_range():
    share = Range(0, 1, 'a share', above=True)
    assert share.read(' .5', 'x')==.5 and share.read('1', 'x')==1
    assert Range(0, 9, 'an integer', whole=True).read('3', 'x')==3
    for text,words in (('0', 'x is 0.0: pass a share'), ('1.1', 'x is 1.1'), ('nan', 'x is nan'), ('inf', 'x is inf'),
            ('a', "x is 'a', not a number"), ('', "x is '', not a number")):
        with pytest.raises(ValueError) as e: share.read(text, 'x')
        assert words in str(e.value)
    with pytest.raises(ValueError, match="x is '.5', not an integer"): Range(0, 9, '', whole=True).read('.5', 'x')

def test_settings():
    "Defaults are the function's, words stand without quotes, the order is the function's"
    @rule('repair', dict(statistics=Choice(('shared', 'per task')), ridge=Range(0, 1, 'a ridge')))
    def redo(models, batches, statistics='shared', ridge=.1, rounds=3): return statistics,ridge,rounds
    what = recipe('redo(rounds=7, statistics = per task)', 'repair')
    assert what.text=='redo(statistics=per task, rounds=7)' and recipe(what.text).settings==what.settings
    assert what(models=1, batches=2, experts=3)==('per task', .1, 7) and recipe('redo')(models=1, batches=2)==('shared', .1, 3)
    assert rules['redo'].inputs==('models', 'batches') and list(rules['redo'].settings)==['statistics', 'ridge', 'rounds']
    for text,words in (('redo(statistics=mine)', "statistics is 'mine': choose one of 'shared', 'per task'"),
            ('redo(rounds=1.5)', 'not an integer'), ('redo(ridge=2)', 'redo(ridge=2): ridge is 2.0: pass a ridge'),
            ('redo(models=2)', "no setting 'models': it takes statistics, ridge, rounds"), ('redo(ridge)', "ridge is ''"),
            ('redo(ridge=.1, ridge=.1)', 'gives ridge twice'), ('redo(', 'is unknown')):
        with pytest.raises(ValueError) as e: recipe(text)
        assert words in str(e.value)
    for kw,words in ((dict(statistics='mine'), 'choose one of'), (dict(ridge=-1), 'ridge is -1')): # called directly, too
        with pytest.raises(ValueError, match=words): redo(1, 2, **kw)
    with pytest.raises(ValueError, match='ridge is -1'): redo(1, 2, 'shared', -1)

def test_none_is_not_set():
    @rule('matrix', dict(part=Range(0, 1, 'a part')))
    def some(updates, part=None): return part
    assert some([], None) is None and recipe('some(part=1)')(updates=[])==1 and recipe('some')(updates=[]) is None
    with pytest.raises(ValueError, match='part is 2'): some([], 2)

def test_needed_setting():
    @rule('matrix')
    def some(updates, power): return power
    assert recipe('some(power=2)')(updates=[])==2
    with pytest.raises(ValueError, match=r'some does not say power: write some\(power=…\)'): recipe('some')

def test_recipe_of_another_kind():
    with pytest.raises(ValueError, match="operation 'snr_max' is unknown: choose one of 'regmean'"):
        recipe('snr_max', 'matrix', 'operation')
    for o in ('', None, 3, float('nan'), 'a b', 'ties)', 'ties(density=.1)x'):
        with pytest.raises(ValueError, match='is unknown'): recipe(o)

# --- definitions

def test_taken_names():
    "Ours and those of others are not replaced in silence; a cell may run twice, a module may be loaded again"
    def ties(updates): return updates[0]
    with pytest.raises(ValueError) as e: rule('matrix')(ties)
    assert 'spectrum_merging.operations.ties' in str(e.value) and 'test_taken_names' in str(e.value)
    with pytest.raises(ValueError, match='snr_winner'): rule('estimator', name='snr_winner')(lambda W: 1)
    def cell(k):
        @rule('matrix')
        def mine(updates): return k
        return mine
    cell(1), cell(2)
    assert recipe('mine')(updates=[])==2 and rules['ties'].f.__module__=='spectrum_merging.operations'
    before = rules['lines'].f
    importlib.reload(strategies)
    assert rules['lines'].f is not before and rules['lines'].f.__qualname__=='lines'

@pytest.mark.parametrize('kind,f,how,words', [
    ('tensor', lambda updates: 1, {}, "kind is 'tensor': choose one of 'layer', 'matrix'"),
    ('matrix', lambda updates: 1, {}, "cannot be called '<lambda>'"),
    ('matrix', lambda updates: 1, dict(name='linear'), "not 'linear'"),
    ('matrix', lambda updates: 1, dict(name='a b'), "cannot be called 'a b'"),
    ('matrix', lambda updates, *more: 1, dict(name='x'), "any number of 'more'"),
    ('matrix', lambda updates, **more: 1, dict(name='x'), "any number of 'more'"),
    ('matrix', lambda updates: 1, dict(name='x', ranges=dict(eps=Range(0, 1, ''))), "range for 'eps', which is no setting"),
    ('matrix', lambda updates: 1, dict(name='x', ranges=dict(updates=Range(0, 1, ''))), "range for 'updates'"),
    ('matrix', lambda updates, eps=2: 1, dict(name='x', ranges=dict(eps=Range(0, 1, 'less'))), 'eps is 2: pass less'),
    ('matrix', lambda updates, how='all': 1, dict(name='x'), "how of x is 'all'"),
    ('matrix', lambda updates, how=True: 1, dict(name='x'), 'with Choice')])
def test_wrong_rules(kind, f, how, words):
    before = dict(rules)
    with pytest.raises(ValueError) as e: rule(kind, **how)(f)
    assert words in str(e.value) and rules==before

# --- one's own

def net(seed, classes=2):
    g = torch.Generator().manual_seed(seed)
    def new(*s): return torch.randn(s, generator=g)
    return {'l1.weight': new(6, 5), 'l1.bias': new(6), 'l2.weight': new(4, 6), 'fc.weight': new(classes, 4)}

ms,base = dict(a=net(1), b=net(2)),net(0)

def on_disk(d):
    for k,sd in dict(ms, base=base).items(): save_file(sd, d/f'{k}.safetensors')
    return {k: d/f'{k}.safetensors' for k in ms},d/'base.safetensors'

def everywhere(plan, d, **how):
    "Merged in memory and on disk, from files and from memory, saved, loaded and verified; in memory"
    files,b = on_disk(d)
    got = merge(plan, ms, base, **how)
    again = Plan.load(plan.save(d/'plan.csv'))
    out = merge(again, files, b, d/'out', **how)
    for t in ms: assert all(v.equal(got[k if k in got else f'{k}@{t}']) for k,v in load_task(out, t).items())
    assert (checks := verify(out, None if not how else {f'grams@{m}': o for m,o in how['grams'].items()}, all=True)).ok.all()
    assert (checks.check=='made again').sum()==len(plan.table)
    return got

def test_own_rule_of_weights(tmp_path):
    "It asks for weights: no base is needed, coefficients are of weights"
    @rule('matrix', dict(power=Range(1, 9, 'a power', whole=True)))
    def power_mean(weights, coefs, power=3):
        total = sum(c*np.sign(w)*abs(w)**power for c,w in zip(coefs, weights))/sum(coefs)
        return np.sign(total)*abs(total)**(1/power)
    plan = make_plan('power_mean(power=1)', ms)
    got = everywhere(plan, tmp_path)
    assert torch.allclose(got['l1.weight'], (ms['a']['l1.weight']+ms['b']['l1.weight'])/2, atol=1e-6)
    assert plan.meta['scale']==.5 and (plan.table.base==0).all()
    assert plan.table.set_index('name').op[['l1.weight', 'l1.bias']].tolist()==['power_mean(power=1)', 'linear']

def test_own_rule_with_moments(tmp_path):
    "It asks for moments: plans with it need them, and say so"
    @rule('matrix')
    def loudest_input(updates, grams):
        at = np.argmax([np.diag(g) for g in grams], 0)
        return np.stack(updates)[at, :, np.arange(len(at))].T
    grams = {m: {'l1.weight': torch.diag(torch.arange(5.)*s+i), 'l2.weight': torch.eye(6)*(1+i)}
        for i,(m,s) in enumerate(dict(a=1, b=-1).items())}
    plan = make_plan('loudest_input', ms, base)
    with pytest.raises(PreflightError, match='l1.weight needs moments of 5 inputs of a, found none'): merge(plan, ms, base)
    with pytest.raises(PreflightError): merge(plan, ms, base, tmp_path/'none')
    got = everywhere(plan, tmp_path, grams=grams)
    assert torch.allclose(got['l1.weight'][:,4], ms['a']['l1.weight'][:,4]) # 4 > −4+1
    assert torch.allclose(got['l1.weight'][:,0], ms['b']['l1.weight'][:,0])
    with pytest.raises(ValueError, match="'loudest_input' adds updates to the base: pass base="): make_plan('loudest_input', ms)

def test_own_layer_rule(tmp_path):
    "With SNRs and without a cut, with a cut, and with neither"
    @rule('layer')
    def softly(snr, power=1.):
        w = snr**power
        return np.c_[np.zeros(len(w)), w/w.sum(1, keepdims=True)]
    @rule('layer')
    def first(shape): return np.eye(1+shape[1])[[1]*shape[0]]
    @rule('layer')
    def cut_only(shape, hi): return np.c_[~hi, np.outer(hi, np.full(shape[1], 1/shape[1]))]
    scans = {m: pd.DataFrame(dict(name=['l1.weight','l2.weight'], snr=s, estimator='flip', of='weights'))
        for m,s in dict(a=[1., 2.], b=[3., 2.]).items()}
    plan = make_plan('softly(power=2)', ms, scans=scans)
    t = plan.table.set_index('name')
    assert np.allclose(t.a[['l1.weight', 'l1.bias', 'l2.weight']], [.1, .1, .5]) and t.snr_b['l1.bias']==3
    assert t.reason['l1.weight']=='by softly(power=2.0)' and t.passes.isna().all() and plan.meta['estimator']=='flip'
    everywhere(plan, tmp_path)
    t = make_plan('first', ms).table.set_index('name')
    assert t.a[['l1.weight', 'l2.weight']].tolist()==[1, 1] and t.reason['l1.weight']=='by first'
    t = make_plan('cut_only', ms, scans=scans, threshold=2.5).table.set_index('name')
    assert t.base[['l1.weight', 'l2.weight']].tolist()==[0, 1] and t.passes[['l1.bias', 'l2.weight']].tolist()==[True, False]
    with pytest.raises(ValueError, match="'softly' has no use for 'top'"): make_plan('softly', ms, top=50)

def test_wrong_results():
    "What a rule gives is looked at"
    @rule('layer')
    def narrow(shape): return np.ones(shape)
    @rule('matrix')
    def small(updates): return updates[0][:1]
    @rule('estimator')
    def many(W): return W[0]
    with pytest.raises(ValueError, match=r'narrow gave coefficients of shape \(2, 2\).*return \(2, 3\)'): make_plan('narrow', ms)
    plan = make_plan('small', ms, base)
    with pytest.raises(ValueError, match=r'l\d.weight cannot get small: it gave shape \(1, (5\), the weights have \(6, 5|6\), the weights have \(4, 6)\)'):
        merge(plan, ms, base)
    with pytest.raises(ValueError, match='estimator many gave'): scan(base, estimator='many', progress=False)

def test_own_estimator():
    "One cell: a plain array in, a number or a dict out"
    shapes = []
    @rule('estimator')
    def share_of_first(W):
        shapes.append((type(W), W.dtype, W.shape))
        s = np.linalg.svd(W, compute_uv=False)
        return s[0]/s.sum()
    @rule('estimator')
    def first_and_last(W, power=1.):
        s = np.linalg.svd(W, compute_uv=False)
        return dict(snr=(s[0]/s[-1])**power, last=s[-1])
    df = scan(base, estimator='share_of_first', progress=False)
    assert set(shapes)=={(np.ndarray, np.dtype('f8'), tuple(base[k].shape)) for k in df.name}
    for r in df.itertuples():
        s = np.linalg.svd(base[r.name].double().numpy(), compute_uv=False)
        assert np.isclose(r.snr, s[0]/s.sum()) and (r.estimator, r.of)==('share_of_first', 'weights')
    both = scan(base, estimator='first_and_last(power=2)', progress=False)
    assert 'last' in both and set(both.estimator)=={'first_and_last(power=2.0)'}
    assert snr(torch.eye(3).bfloat16(), 'share_of_first')==pytest.approx(1/3)
    with pytest.raises(ValueError, match='w holds 1 NaN'): snr([[1., float('nan')]], 'share_of_first', 'w')
    plan = make_plan('snr_winner', ms, base, estimator='share_of_first')
    assert plan.meta['estimator']=='share_of_first' and plan.meta['of']=='update'
    update = {k: ms['a'][k].double()-base[k].double() for k in base}
    want = scan(update, estimator='share_of_first', progress=False).set_index('name').snr
    assert np.isclose(plan.table.set_index('name').snr_a['l1.weight'], want['l1.weight'])
    with pytest.raises(ValueError, match="made with {'estimator': 'share_of_first'"):
        make_plan('snr_winner', dict(a=base, b=base), scans=dict(a=df, b=df))

def test_passes(tmp_path):
    "A column of its own, kept by files, absent from old ones, not in the digest"
    scans = {m: pd.DataFrame(dict(name=['l1.weight','l2.weight'], snr=s, estimator='flip', of='weights'))
        for m,s in dict(a=[1., 2.], b=[3., 2.]).items()}
    plan = make_plan('snr_winner', ms, top=50, scans=scans)
    t = plan.table.set_index('name')
    peak = t[['snr_a', 'snr_b']].max(axis=1)
    known = peak.notna()
    assert t.passes[known].tolist()==(peak[known]>plan.meta['cut']).tolist() and t.passes[~known].isna().all()
    assert set(t.passes[known])=={True, False} and t.passes[t.role=='head'].isna().all()
    back = Plan.load(plan.save(tmp_path/'p.csv'))
    pd.testing.assert_frame_equal(back.table, plan.table, check_dtype=False)
    assert back.table.passes.dtype==plan.table.passes.dtype=='boolean'
    Plan(plan.table.drop(columns='passes'), plan.meta).save(tmp_path/'old.csv')
    old = Plan.load(tmp_path/'old.csv')
    assert old.digest==plan.digest and 'passes' not in old.table and old.explain('l1')==plan.explain('l1')

def test_canonical_text_in_plans():
    plan = make_plan(' lines ( slope = .50 ) ', ms, base)
    assert plan.meta['strategy']=='lines(slope=0.5)' and plan.meta['scale']==.5
    assert plan.explain('l1').startswith('strategy=lines(slope=0.5), protocol=unit')
    assert plan.digest==make_plan('lines(slope=0.5)', ms, base).digest!=make_plan('lines', ms, base).digest
    with pytest.raises(ValueError, match='gives slope twice'): make_plan('lines(slope=1, slope=2)', ms, base)
