"One line opens what a notebook needs; types, tables and commands that a newcomer meets first."
import ast, builtins, os, subprocess, sys
from importlib import import_module
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from spectrum_merging import all as everything
from spectrum_merging.checkpoint import Checkpoint
from spectrum_merging.edges import measure
from spectrum_merging.explore import plot_choice
from spectrum_merging.plan import make_plan
from spectrum_merging.rules import recipe, rule_lines, rule_names
from spectrum_merging.scan import scan
from spectrum_merging.spectrum import spectrum

lib = Path(__file__).parent.parent/'spectrum_merging'

def test_star_import():
    "Every name is there, is of this package, and hides nothing of Python's"
    space = {}
    exec('from spectrum_merging.all import *', space)
    assert set(everything.__all__) <= set(space)
    assert not set(everything.__all__) & set(dir(builtins))
    for k in everything.__all__:
        if callable(o := getattr(everything, k)): assert o.__module__.startswith('spectrum_merging.'), k

def _patched():
    "`(module, class, method)` of public methods that are added to a class after it was made"
    for p in lib.rglob('*.py'):
        for n in ast.parse(p.read_text(encoding='utf-8')).body:
            if isinstance(n, ast.FunctionDef) and n.name[0]!='_' and any('patch' in ast.unparse(d) for d in n.decorator_list):
                yield '.'.join(p.relative_to(lib).with_suffix('').parts),ast.unparse(n.args.args[0].annotation),n.name

def test_checkers_see_patched_methods():
    "Of the classes that `all` gives, since a type checker reads the class and not what is added to it"
    public = {(m, c, f) for m,c,f in _patched() if c in everything.__all__}
    assert {('plan','Plan','explain'), ('checkpoint','Checkpoint','read')} <= public
    for _,c,f in public: assert f in getattr(everything, c).__annotations__, f'{c}.{f}'

def test_typed(): assert (lib/'py.typed').is_file()

evil = '<img src=x onerror=alert(1)>'

def _models(name='layer'):
    g = torch.Generator().manual_seed(0)
    base = {f'{name}.{i}.weight': torch.randn(24, 40, generator=g) for i in range(3)}
    def tuned(t): return {k: w+.01*torch.randn(w.shape, generator=g)+t*torch.ones(w.shape).tril() for k,w in base.items()}
    return base,tuned(.01),tuned(.02)

def _shows(o, *words):
    "The page has the words, a box that scrolls, no colour of its own, and no tag from a name"
    text = o._repr_html_()
    for w in words: assert w in text, w
    assert 'overflow' in text and '<img' not in text and 'background:white' not in text.replace(' ', '') and '#fff' not in text
    return text

def test_tables():
    base,a,b = _models(evil)
    df = scan(a, base, progress=False)
    _shows(df, 'SNR of update by flip', '3 tensors', '&lt;img')
    assert type(df[df.snr>=0]) is type(df.assign(x=1)) is pd.DataFrame and type(df.copy()) is pd.DataFrame
    assert pd.DataFrame(df).equals(df[:]) and df.snr.gt(0).any()
    del df['snr'], df['of']
    _shows(df, '&lt;img')
    _shows(Checkpoint(a), '24 × 40', '960', '&lt;img')
    _shows(spectrum(a[f'{evil}.0.weight']), 'n_spikes', 'stable_rank')
    plan = make_plan('snr_winner', dict(a=a, b=b), base, estimator='mp')
    _shows(plan, plan.digest, '&lt;img')
    assert plan.plot().axes

@pytest.mark.parametrize('W', [np.zeros((4, 6)), np.ones((1, 5)), np.eye(3)*1e200])
def test_odd_spectra(W): _shows(spectrum(W), 'sigma')

def test_tied():
    net = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False))
    net[1].weight = net[0].weight
    _shows(Checkpoint(net), 'tied to', '0.weight')

@pytest.mark.parametrize('text, near', [('snr_wnner', 'snr_winner'), ('tvs_m', 'tsv_m'), ('snr_max(', 'snr_max'), ('Standard', 'standard')])
def test_did_you_mean(text, near):
    with pytest.raises(ValueError, match=f"did you mean '{near}'"): recipe(text, ('layer','matrix'), 'strategy')

def test_nothing_near():
    with pytest.raises(ValueError, match="'qqqq' is unknown: choose one of"): recipe('qqqq')

def test_list_and_version(tmp_path):
    "Alone, without models"
    (tmp_path/'spectrum-merge').write_text("import sys; from spectrum_merging.cli import merge_cli; sys.exit(merge_cli())")
    def run(*args): return subprocess.run([sys.executable, tmp_path/'spectrum-merge', *args], capture_output=True, text=True,
        env=os.environ|dict(PYTHONPATH=str(lib.parent)))
    version = run('--version')
    assert version.returncode==0 and version.stdout.strip()==f"spectrum-merging {import_module('spectrum_merging').__version__}"
    said = run('--list')
    assert said.returncode==0 and not said.stderr
    for text,what in rule_lines('layer','matrix','estimator'):
        line = next(o for o in said.stdout.splitlines() if o.split()[:1]==text.split()[:1])
        assert what in line and what
    assert run('--strategy', 'x').returncode==2

def test_every_rule_is_listed_with_its_source():
    lines = dict(rule_lines('layer','matrix'))
    assert [o.partition('(')[0] for o in lines]==rule_names('layer','matrix')
    assert lines['ties(density=0.2, trim=…)'].endswith('https://arxiv.org/abs/2306.01708).')

def test_choice_without_measurements():
    "Nothing measured is said in the picture; no accuracy of the experts is an error"
    t = pd.DataFrame(dict(unit=['l'], snr_a=[1.], snr_b=[2.], passes=[True], base=[0.], a=[0.], b=[1.]))
    t.attrs.update(strategy='s', of='update', top=50, cut=.5)
    for scores in (None, pd.DataFrame()):
        fig = plot_choice(t, scores, dict(a=.9, b=.8))
        assert 'not measured' in [o.get_text() for ax in fig.axes for o in ax.texts]
    with pytest.raises(ValueError, match=r'experts say nothing of a, b.*plan.plot\(\)'): plot_choice(t)
    with pytest.raises(ValueError, match='experts say nothing of b'): plot_choice(t, None, dict(a=.9))
    with pytest.raises(ValueError, match=r"scores lack \['accuracy'"): plot_choice(t, pd.DataFrame(dict(task=['a'])), dict(a=.9, b=.8))

def test_kept_by_measure():
    found = []
    measure(np.eye(4)+1., 'mp', seen=lambda M, o: found.append((M.shape, o.n_spikes)))
    assert found[0][0]==(4, 4)
