"The explorer without a browser: every control, what is saved, what is refused, and the command that does the same."
import re, shlex, subprocess, sys
from html import unescape
from pathlib import Path
from xml.etree import ElementTree
import pytest, torch
from safetensors.torch import save_file
from spectrum_merging.explorer import explore, merge_command
from spectrum_merging.plan import Plan, make_plan
from spectrum_merging.shown import shown_value
from spectrum_merging.survey import Survey

shapes = {f'block{i}.{k}.weight': s for i in range(3) for k,s in dict(q=(32, 32), up=(80, 32), down=(32, 80)).items()}

def make_models(n=2, head=False):
    "A base, and models that differ from it by noise and a direction of another strength in each matrix"
    g = torch.Generator().manual_seed(0)
    base = {k: torch.randn(s, generator=g)/8 for k,s in shapes.items()} | {'block0.norm.weight': torch.ones(32)}
    def tuned(seed):
        g,res = torch.Generator().manual_seed(seed),{}
        for k,w in base.items():
            res[k] = w+.01*torch.randn(w.shape, generator=g)
            if w.ndim<2: continue
            u,v = (torch.randn(o, generator=g) for o in w.shape)
            res[k] += .02*float(torch.rand(1, generator=g))*torch.outer(u, v)
        if head: res |= {'classifier.weight': torch.randn(2+seed, 32, generator=g), 'classifier.bias': torch.zeros(2+seed)}
        return res
    return {k: tuned(i+1) for i,k in enumerate(['cats','dogs','birds'][:n])},base

@pytest.fixture(scope='module')
def made(): return make_models()

@pytest.fixture
def panel(made, tmp_path):
    models,base = made
    return explore(models, base=base, estimator='mp', progress=False, out=tmp_path/'saved')

def shown(panel):
    "Cells of the page's table, without the last column"
    rows = re.findall('<tr.*?</tr>', panel.controls['table'].value, re.S)
    return [[unescape(o) for o in re.findall('<t[hd][^>]*>(.*?)</t[hd]>', r, re.S)][:-1] for r in rows]

def same(panel, plan):
    "What the page shows is that plan"
    assert shown(panel)==[list(plan.table), *([unescape(shown_value(v)) for v in o] for o in plan.table.itertuples(index=False))]
    assert plan.digest in panel.controls['words'].value and panel.plan.meta==plan.meta

def test_every_control(panel, made):
    models,base = made
    c,old = panel.controls,panel.controls['layers'].value
    def moved(k, v, **how):
        nonlocal old
        c[k].value = v
        same(panel, make_plan(how.pop('strategy', panel.strategy), models, base, **how))
        assert c['layers'].value!=old
        old = c['layers'].value
    moved('top', 30., estimator='mp', top=30.)
    assert 'last step' in c['words'].value
    moved('estimator', 'flip', estimator='flip', top=30.)
    moved('of', 'weights', estimator='flip', of='weights', top=30.)
    moved('strategy', 'snr_max', strategy='snr_max', estimator='flip', of='weights', top=30.)
    c['cut'].value = 'threshold'
    assert panel.top is None and c['top'].layout.display=='none' and c['threshold'].layout.display==''
    moved('threshold', c['threshold'].value*2, estimator='flip', of='weights', threshold=float(f"{c['threshold'].value*2:.4g}"))
    moved('strategy', 'tsv_m')
    assert c['cut'].disabled and not c['scale'].disabled and c['scale'].value==1
    moved('scale', .4, scale=.4)
    moved('settings', 'share=0.3', strategy='tsv_m(share=0.3)', scale=.4)
    old_spectra,words = c['spectra'].value,c['words'].value
    c['layer'].value = next(k for k in c['layer'].options if k!=panel.layer)
    assert c['spectra'].value!=old_spectra and c['words'].value==words # the plan is the same

def test_traits_move_controls(panel):
    c = panel.controls
    panel.threshold = 3.
    assert (panel.top, c['cut'].value, round(c['threshold'].value, 6))==(None, 'threshold', 3)
    panel.top = 40.
    assert (panel.threshold, c['cut'].value, c['top'].value)==(None, 'share of layers', 40)
    panel.threshold = -2. # no slider has it, but it is a threshold
    assert panel.threshold==-2 and panel.plan.meta['threshold']==-2
    panel.threshold = None
    assert panel.top==50
    panel.choose(strategy='lines(slope=2)', scale=3.)
    assert (c['strategy'].value, c['settings'].value, c['scale'].value)==('lines', 'slope=2.0', 3)
    panel.estimator = 'mp(alpha=0.05)'
    assert c['estimator'].value=='mp(alpha=0.05)' and not panel.problem
    with pytest.raises(ValueError, match='both given'): panel.choose(threshold=3., top=50.)

@pytest.mark.parametrize('k, v, text', [('strategy','snr_wnner',"did you mean &#x27;snr_winner&#x27;"), ('strategy','ties(density=7)','density'),
    ('estimator','mq','unknown'), ('of','weihgts','choose'), ('top',300.,'top is 300'), ('strategy','regmean(',"unknown")])
def test_refusals(panel, k, v, text):
    before = getattr(panel, k)
    setattr(panel, k, v)
    c = panel.controls
    assert text in c['words'].value and c['table'].value=='' and c['layers'].layout.display=='none'
    panel.save_plan()
    assert 'Nothing to save' in c['said'].value and not panel.out.exists()
    setattr(panel, k, before)
    assert not panel.problem and c['table'].value and c['layers'].layout.display==''

def test_first_choice_is_refused(made):
    models,base = made
    with pytest.raises(ValueError, match='falls back to the base'): explore(*models.values(), strategy='base_reset', progress=False)
    with pytest.raises(ValueError, match='needs 2 or more'): explore([models['cats']], progress=False)
    with pytest.raises(ValueError, match='put all of them'): explore([*models.values()], models['cats'], progress=False)
    with pytest.raises(TypeError, match='the one path'): explore('a', progress=False)

def test_strategies_without_base(made):
    models = [*made[0].values()]
    panel = explore(*models, estimator='mp', progress=False)
    assert panel.survey.kinds==['weights'] and list(panel.controls['of'].options)==['weights']
    for k in panel.controls['strategy'].options:
        panel.controls['strategy'].value = k
        assert not panel.problem, k
        same(panel, make_plan(k, models, **panel.asked))

def test_three_models_with_heads():
    models,base = make_models(3, head=True)
    panel = explore(models, base=base, estimator='mp', progress=False)
    assert 'snr_lowA' not in panel.controls['strategy'].options
    for k in panel.controls['strategy'].options:
        panel.controls['strategy'].value = k
        assert not panel.problem, k
        same(panel, make_plan(k, models, base, **panel.asked))
    assert 'classifier.weight' in panel.controls['layer'].options
    panel.controls['layer'].value = 'classifier.weight' # of other sizes, and not in the base
    assert not panel.problem

def test_heads_of_other_sizes_without_base():
    models,_ = make_models(2, head=True)
    panel = explore(models, estimator='mp', layer='classifier.weight', progress=False)
    assert panel.layer=='classifier.weight' and 'same directions' not in panel.controls['spectra'].value
    panel.layer = 'block1.q.weight'
    assert 'same directions' in panel.controls['spectra'].value

def test_saved(panel, made):
    c = panel.controls
    c['plan'].click()
    path = panel.out/f'plan-{panel.plan.digest}.csv'
    again = Plan.load(path)
    assert again.digest==panel.plan.digest and again.meta==panel.plan.meta and str(path) in c['said'].value
    c['plan'].click() # the same file, once
    assert len([*panel.out.iterdir()])==1
    path.write_text('mine')
    c['plan'].click()
    assert path.read_text()=='mine' and Plan.load(path.with_stem(path.stem+'-1')).digest==panel.plan.digest
    c['picture'].click()
    (drawn,) = panel.out.glob('picture-*.svg')
    ElementTree.parse(drawn)
    c['command'].click()
    (text,) = (o.read_text() for o in panel.out.glob('merge-*'))
    assert text==panel.command+'\n' and text.startswith('merge(make_plan(')

def test_no_place_to_save(panel, tmp_path):
    (tmp_path/'saved').write_text('a file')
    panel.controls['plan'].click()
    assert 'saved:' in panel.controls['said'].value or 'File exists' in panel.controls['said'].value

@pytest.mark.parametrize('choice', [dict(strategy='snr_winner', top=30.), dict(strategy='snr_max', threshold=-1., of='weights'),
    dict(strategy='ties(density=0.3)', scale=.7), dict(strategy='standard')])
def test_command_does_the_same(made, tmp_path, choice):
    "The line that is shown, run by `spectrum-merge`, writes the same plan"
    models,base = made
    for k,o in (models | dict(base=base)).items(): save_file(o, tmp_path/f'{k} 1.safetensors')
    at = {k: str(tmp_path/f'{k} 1.safetensors') for k in (*models, 'base')}
    panel = explore({m: at[m] for m in models}, base=at['base'], estimator='mp', folder=tmp_path/'kept', progress=False, **choice)
    command,*words = shlex.split(panel.command)
    assert command=='spectrum-merge'
    subprocess.run([Path(sys.executable).parent/command, *words], cwd=tmp_path, check=True)
    assert Plan.load(tmp_path/'merged/plan.csv').digest==panel.plan.digest

def test_commands():
    assert merge_command({'big cats': 'a', 'dogs': 'b'}, None, 'standard').startswith('merge(make_plan(') # no command takes that name
    assert merge_command(['a', {}], 'c', 'standard', []).startswith("merge(make_plan('standard', models, base, heads=[])")
    assert '--heads none' in merge_command(['a','b'], None, 'standard', [])
    assert '--heads a,b' in merge_command(['a','b'], None, 'standard', ['a','b'])

def test_names_are_text(made):
    models,base = made
    bad = '<img src=x onerror=y>'
    odd = {'a b': models['cats'], '$frac{$': models['dogs']}
    panel = explore({k: {f'{bad}.{n}': w for n,w in o.items()} for k,o in odd.items()}, base={f'{bad}.{n}': w for n,w in base.items()},
        estimator='mp', progress=False)
    panel.top = 25.
    assert not panel.problem
    for k in ('words','layers','spectra','table','line'): assert '<img' not in panel.controls[k].value

def test_kept_on_disk(made, tmp_path, monkeypatch):
    "A second look measures nothing, and shows the same"
    models,base = made
    for k,o in (models | dict(base=base)).items(): save_file(o, tmp_path/f'{k}.safetensors')
    given = [tmp_path/f'{m}.safetensors' for m in models]
    def look(): return explore(given, base=tmp_path/'base.safetensors', folder=tmp_path/'kept', progress=False)
    first = look()
    monkeypatch.setattr(Survey, '_measured', lambda *args: pytest.fail('measured again'))
    again = look()
    for k in ('layers','spectra','words','table','line'): assert again.controls[k].value==first.controls[k].value
    (tmp_path/'kept').rename(tmp_path/'gone')
    monkeypatch.undo()
    (tmp_path/'kept').write_text('no folder') # nothing can be kept: measured, and shown
    assert look().controls['table'].value==first.controls['table'].value

def test_experts_in_one_tensor():
    "Each matrix of a stack can be looked at"
    g = torch.Generator().manual_seed(0)
    base = {'experts.up_proj': torch.randn(4, 32, 48, generator=g), 'experts.up_proj_bias': torch.zeros(4, 32), 'a.weight': torch.randn(32, 48, generator=g)}
    models = [{k: v+.01*torch.randn(v.shape, generator=g) for k,v in base.items()} for _ in range(2)]
    panel = explore(models, base=base, estimator='mp', threshold=1., progress=False)
    assert 'experts.up_proj[3]' in panel.controls['layer'].options
    panel.layer = 'experts.up_proj[3]'
    panel.estimator = 'spectrum' # reads the tensor as one matrix
    assert not panel.problem and panel.layer=='experts.up_proj'

def test_picture_for_pages_without_kernel(panel):
    data = panel._repr_mimebundle_()
    assert 'application/vnd.jupyter.widget-view+json' in data
    assert ElementTree.fromstring(data['image/svg+xml']).get('width')=='960'
