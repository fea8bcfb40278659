"One line opens what a notebook needs; types, tables and commands that a newcomer meets first."
import ast, builtins, os, subprocess, sys
from importlib import import_module
from pathlib import Path
from typing import get_args
import numpy as np, pandas as pd, pytest, torch
from spectrum_merging import all as everything, rules
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

# --- A type checker and an editor

right = '''
from spectrum_merging.all import *
from spectrum_merging.rules import Recipe
import pandas as pd
ck = Checkpoint('x')
for k in ck: ck.read(k)
n: int = len(ck)
p = make_plan('snr_winner', ['a', 'b'], 'c', top=50, estimator='mp')
said = p.explain('w')
p.plot().savefig('x.png')
q: Plan = Plan.load(p.save('y.csv'))
s: Spectrum = spectrum(ck.read('w'))
edge: float = s.edge+s.snr
table: pd.DataFrame = scan('a', 'c', estimator='mp')
found: Recipe = recipe('ties(density=0.2)')
merge(q, ['a','b'], 'c', 'out')
compare(dict(a='a'), 'b', dict(a='x'), 'out', budget='1m')
verify('out').ok.all()
extract('a', 'b', 'c', rank=4)
address: str = push_to_hub('out', 'me/x', private=False)
@rule('layer')
def mine(shape, slope=1.): return None
'''
wrong = '''
from spectrum_merging.all import *
make_plan(3, ['a'])
make_plan('standard', ['a'], topp=3)
make_plan('standard', ['a'], top='half')
Plan.load('y').nothing
x: str = spectrum([[1.]]).snr
n: str = len(Checkpoint('x'))
merge('plan', ['a','b'])
push_to_hub('out')
recipe('ties').txt
Spectrum().zzz
'''

def test_type_checker(tmp_path):
    "What is right passes, and each line that is wrong is found"
    pytest.importorskip('mypy')
    (tmp_path/'mypy.ini').write_text('[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n'
        + ''.join(f'[mypy-{o}.*]\nfollow_imports = skip\n' for o in ('torch','transformers','torchvision','scipy','matplotlib','sklearn','huggingface_hub','PIL','fastcore','datasets')))
    def lines(name, text):
        (tmp_path/f'{name}.py').write_text(text)
        p = subprocess.run([sys.executable, '-m', 'mypy', '--config-file', 'mypy.ini', f'{name}.py'], capture_output=True, text=True, cwd=tmp_path,
            env=os.environ|dict(MYPYPATH=str(lib.parent), MYPY_CACHE_DIR=str(tmp_path/'cache')))
        assert p.returncode<2, p.stdout+p.stderr
        return {int(o.split(':')[1]) for o in p.stdout.splitlines() if o.startswith(f'{name}.py:') and ' error: ' in o},p.stdout
    found,said = lines('right', right)
    assert not found, said
    found,said = lines('wrong', wrong)
    assert found=={*range(3, len(wrong.splitlines())+1)}, said

def test_names_for_editors():
    "Types list the rules that there are"
    assert list(get_args(rules.Strategy))==rule_names('layer', 'matrix') and list(get_args(rules.Estimator))==rule_names('estimator')

def test_rooms_are_called():
    "A module of a function's name is that function when it is called"
    from spectrum_merging import merge, rules, scan
    assert scan({'a.weight': torch.randn(12, 20)}, progress=False).name.tolist()==['a.weight']
    assert callable(merge) and not callable(rules) and scan.Scan is type(scan.scan({'a.weight': torch.randn(12, 20)}, progress=False))

def test_question_mark():
    "`f?` in IPython says what each argument is; `__doc__` stays one line"
    getdoc = pytest.importorskip('IPython.core.oinspect').getdoc
    text = getdoc(make_plan)
    assert text.startswith('Decide every tensor') and 'threshold: SNR to pass' in text and len(make_plan.__doc__.splitlines())==1
    assert 'returns: One line per tensor' in getdoc(everything.Plan.explain) and 'src: Module, mapping' in getdoc(Checkpoint.__init__)
    for k in everything.__all__:
        if callable(o := getattr(everything, k)): assert getdoc(o)
