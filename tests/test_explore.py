"The panel without a browser: every combination draws, gaps are named, broken folders are refused."
import base64, json, sys, warnings
from io import BytesIO
from itertools import product
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from spectrum_merging.evaluate import wilson
from spectrum_merging.explore import MergePanel, decide, describe, flipped, plot_choice, write_notebook
from spectrum_merging.plan import make_plan
from spectrum_merging.scan import scan

tasks = 'big cats', 'dogs'
layers = {k: (48, 64) for k in ('conv1','layer1.0.conv1','layer1.0.conv2','layer2.0.conv1','layer2.0.downsample.0')}

def _tuned(base, loud, seed):
    "The base plus noise, and a direction in each layer of the strengths `loud`"
    g = torch.Generator().manual_seed(seed)
    res = {}
    for (k,w),t in zip(base.items(), loud):
        u,v = (torch.randn(o, generator=g) for o in w.shape)
        res[k] = w + .01*torch.randn(w.shape, generator=g) + t*torch.outer(u, v)
    return res

def make_merges():
    "scans, rows, experts for a `MergePanel`: five layers, invented accuracies; 'snr_max' at 50 % is not measured"
    g = torch.Generator().manual_seed(0)
    base = {f'{k}.weight': torch.randn(o, generator=g) for k,o in layers.items()}
    models = {t: _tuned(base, loud, i+1) | {'fc.weight': torch.randn(5, 64, generator=g)} for i,(t,loud) in
        enumerate(zip(tasks, ([.02,.01,.004,.003,.001], [.001,.02,.002,.006,.01])))}
    scans = dict(weights={t: scan(o, estimator='paper_vision', progress=False) for t,o in models.items()},
        update={t: scan(o, base, progress=False) for t,o in models.items()})
    rows = []
    for i,(s,of,top,bn,t,seed) in enumerate(product(['standard','base_reset','snr_winner','snr_max'], scans,
        [25., 50., 75.], ['averaged','shared','per task'], tasks, [0, 1])):
        if s=='snr_max' and top==50: continue
        a = dict(of=of, top=top) if s!='standard' else dict(of=None, top=None)
        if s=='standard' and (of,top)!=('weights',25.): continue
        k = 100+i*37%90
        lo,hi = wilson(k, 200)
        rows.append(dict(strategy=s, bn=bn, task=t, accuracy=k/200, lo=lo, hi=hi, n=200, seed=seed) | a)
    return scans,pd.DataFrame(rows),dict(zip(tasks, (.95, .97)))

def write_results(d, scans, rows, experts):
    "The same as a folder that `spectrum-run` could have written"
    (d/'scans').mkdir(parents=True)
    index = {of: {t: f"{of}-{t.replace(' ', '-')}.csv" for t in o} for of,o in scans.items()}
    for of,o in scans.items():
        for t,df in o.items(): df.to_csv(d/'scans'/index[of][t], index=False)
    (d/'scans/index.json').write_text(json.dumps(index))
    ref = [dict(table='reference', method=f'expert {e}, own head', task=t, accuracy=a if e==t else .2)
        for e,a in experts.items() for t in experts]
    pd.concat([pd.DataFrame(ref), rows.assign(table='grid')]).to_csv(d/'results.csv', index=False)
    return d

@pytest.fixture(scope='module')
def merges(): return make_merges()

@pytest.fixture
def results(merges, tmp_path): return write_results(tmp_path/'results', *merges)

@pytest.fixture
def panel(merges): return MergePanel(*merges)

def size(png): return Image.open(BytesIO(png)).size

def test_all_combinations(panel):
    "A picture of one size and a text for each, no warning, no figure left in pyplot"
    start = size(panel.image.value)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for of,bn,s,top in product(panel.of.options, panel.bn.options[-1:], panel.strategy.options, (25., 50.)):
            panel.of.value,panel.bn.value,panel.strategy.value,panel.top.value = of,bn,s,top
            gap = s not in ('standard','base_reset','snr_winner','snr_max') or (s,top)==('snr_max', 50)
            assert ('not measured' in panel.text.value)==gap==(not len(panel.scores))
            assert size(panel.image.value)==start
    if 'matplotlib.pyplot' in sys.modules: assert not sys.modules['matplotlib.pyplot'].get_fignums()

def test_controls_change_traits(panel):
    seen = [panel.image.value]
    for control,value in ((panel.top, 75.), (panel.strategy, 'base_reset'), (panel.of, 'weights'),
            (panel.bn, 'per task')):
        control.value = value
        assert panel.image.value not in seen
        seen.append(panel.image.value)
    assert not panel.top.continuous_update

def test_numbers_are_the_rows(panel, merges):
    _,rows,experts = merges
    panel.strategy.value,panel.top.value,panel.bn.value = 'snr_winner',75.,'shared'
    own = rows[(rows.strategy=='snr_winner') & (rows.of=='update') & (rows.top==75) & (rows.bn=='shared')]
    mean = own.groupby('task').accuracy.mean()
    for v in mean: assert f'<b>{v:.3f}</b>' in panel.text.value
    ratio = np.mean([mean[t]/a for t,a in experts.items()])
    assert f'experts <b>{ratio:.3f}</b>' in panel.text.value
    assert '2 seeds from' in panel.text.value

def test_standard_has_one_row_for_all(panel):
    panel.strategy.value = 'standard'
    assert len(panel.scores)==4 and panel.top.disabled and panel.of.disabled
    panel.strategy.value = 'snr_winner'
    assert not panel.top.disabled

def test_decide_is_the_plan(merges):
    "The same coefficients as a plan made from models"
    scans,shapes = merges[0]['weights'],{}
    for df in scans.values(): shapes |= dict(zip(df.name, df['shape']))
    models = {t: {k: torch.zeros(o) for k,o in shapes.items()} for t in scans}
    for s,top in product(('snr_winner','snr_max','snr_weighted'), (30, 50, 100)):
        plan = make_plan(s, models, top=top, scans=scans, of='weights', estimator='paper_vision').table
        plan = plan[plan.role!='head'].set_index('unit')
        table = decide(scans, s, top)
        cols = ['base', *scans]
        assert np.array_equal(table[cols].to_numpy(float), plan.loc[table.unit, cols].to_numpy(float))

def test_flips(merges):
    scans = merges[0]['update']
    a,b = decide(scans, 'snr_winner', 30),decide(scans, 'snr_winner', 70)
    moved = flipped(b, a)
    assert moved and set(moved)==set(b.unit[b.passes & ~a.passes])
    assert flipped(a, a)==[] and flipped(a)==[]
    assert 'changed no layer' in describe(a, pd.DataFrame(), a)

@pytest.mark.parametrize('n, k', [(1, 1), (6, 2), (80, 4)])
def test_odd_sizes(n, k):
    "One layer, many layers, four tasks, SNRs of zero, top 100 %"
    g = np.random.default_rng(0)
    def one(): return pd.DataFrame(dict(name=[f'l{i}.weight' for i in range(n)], role='matrix',
        unit=[f'l{i}' for i in range(n)], shape=[(4, 4)]*n, snr=g.exponential(size=n)*(np.arange(n)%2)))
    scans = {f'task <{i}>': one() for i in range(max(k, 2))}
    for top in (40, 100):
        table = decide(scans, 'snr_winner', top)
        fig = plot_choice(table, pd.DataFrame(columns=['task','accuracy','lo','hi','n','seed']),
            dict.fromkeys(scans, .9))
        fig.savefig(BytesIO(), format='png')
    assert 'All' in describe(table, pd.DataFrame())

def test_picture_fallback(panel):
    data = panel._repr_mimebundle_()
    assert 'application/vnd.jupyter.widget-view+json' in data
    assert base64.b64decode(data['image/png']).startswith(b'\x89PNG\r\n')

def test_text_is_escaped(merges):
    scans,rows,experts = merges
    bad = {'dogs': '<b onclick=x>', 'big cats': 'big cats'}
    scans = {of: {bad[t]: df for t,df in o.items()} for of,o in scans.items()}
    panel = MergePanel(scans, rows.assign(task=rows.task.map(bad)), {bad[t]: a for t,a in experts.items()})
    panel.top.value = 75.
    assert '&lt;b onclick=x&gt;' in panel.text.value and '<b onclick' not in panel.text.value

def test_wrong_tables(merges):
    scans,rows,experts = merges
    def refuses(text, *args):
        with pytest.raises(ValueError, match=text): MergePanel(*args)
    refuses("lack the columns", scans, rows.drop(columns='top'), experts)
    refuses("no measured share", scans, rows[:0], experts)
    refuses("different tasks", scans, rows, experts | dict(birds=.5))
    refuses("different tasks", scans, rows[rows.task=='dogs'], experts)
    one = scans['update']['dogs']
    refuses("differ in conv1.weight", dict(update=scans['update'] | dict(dogs=one[1:])), rows, experts)

def test_from_folder(panel, results):
    again = MergePanel.from_folder(results)
    assert again.text.value==panel.text.value and again.of.options==panel.of.options
    again.strategy.value = 'standard'
    assert len(again.scores)==4

def _no_seed(text): return '\n'.join(o.rpartition(',')[0] for o in text.splitlines())
def _no_grid(text): return text.replace('grid', 'sound')
def _no_expert(text): return text.replace('expert dogs, own', 'expert dogs, another')

@pytest.mark.parametrize('file, text, error', [
    ('results.csv', None, 'results.csv is missing'),
    ('results.csv', '', 'results.csv cannot be read'),
    ('results.csv', 'a,b\n1,2\n', "lacks the columns .*'table'"),
    ('results.csv', _no_seed, 'lacks the columns'),
    ('results.csv', _no_grid, "no rows of the table 'grid'"),
    ('results.csv', _no_expert, "no row 'expert dogs, own head'"),
    ('scans/index.json', None, 'index.json is missing'),
    ('scans/index.json', '{', 'index.json cannot be read'),
    ('scans/index.json', '{}', 'does not name one file per task'),
    ('scans/index.json', '["weights"]', 'does not name one file per task'),
    ('scans/index.json', '{"update": {"dogs": "x.csv"}}', 'does not name one file per task'),
    ('scans/index.json', '{"update": {"dogs": "../x.csv", "big cats": "y.csv"}}', 'does not name one file'),
    ('scans/update-dogs.csv', None, 'update-dogs.csv is missing'),
    ('scans/update-dogs.csv', '', 'update-dogs.csv cannot be read'),
    ('scans/update-big-cats.csv', 'name,snr\na,1\n', "'unit', 'role', 'shape'")])
def test_broken_folders(results, file, text, error):
    f = results/file
    if text is None: f.unlink()
    else: f.write_text(text(f.read_text()) if callable(text) else text)
    with pytest.raises((FileNotFoundError, ValueError), match=error): MergePanel.from_folder(results)

def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='spectrum-run EXPERIMENT --out'): MergePanel.from_folder(tmp_path/'no')

def test_notebook_for_voila(results, tmp_path):
    "One cell that runs by itself, whatever the folder is called"
    odd = results.rename(results.with_name('it\'s "odd"'))
    nb = json.loads(write_notebook(odd, tmp_path/'x.ipynb').read_text())
    space = {}
    code,last = nb['cells'][0]['source'].split('\n')
    exec(code, space)
    assert isinstance(eval(last, space), MergePanel)

def test_command(results, monkeypatch, capsys):
    "The folder is checked first; without voila there is a sentence that says how to get it"
    from fastcore.script import CliError
    from spectrum_merging.cli import explore_cli
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(CliError, match=r"pip install 'spectrum-merging\[browser\]'"): explore_cli(str(results))
    with pytest.raises(CliError, match='results.csv is missing'): explore_cli(str(results/'scans'))
