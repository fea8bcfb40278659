"The experiments' lessons cell by cell on tiny data: what a real run of hours left comes from sources that run."
import ast, html, json, re
from dataclasses import replace
from functools import partial
from pathlib import Path
import pytest
from spectrum_merging.files import cache_dir
from spectrum_merging.lab import inside, run as lab_run, tasks as lab_tasks, texts as lab_texts
from spectrum_merging.lab.completions import CompletionBudget, Completions, tiny_decoder
from spectrum_merging.lab.images import ImageBudget
from spectrum_merging.lab.many import many_rows
from spectrum_merging.lab.packaged import eight
from spectrum_merging.lab.parts import grid_rows
from spectrum_merging.lab.tasks import digits_tasks, generated_texts
from spectrum_merging.lab.texts import TextBudget, Texts, load_tokenizer, tiny_base
from spectrum_merging.lab.uses import tuned_rows

lessons = Path(__file__).parents[1]/'nbs/experiments'
few = dict(task_arithmetic=[('task_arithmetic', .5)], ridge_mean=[('ridge_mean(eps=0.1)', 1.)], tsv_m=[('tsv_m', 1.)],
    regmean=[('regmean(alpha=0.9)', 1.)], matched=[('match(ridge=0.01)', None)])

# Vision's lesson shows intervals over seeds; those of texts only have them in tables.
seeds = {'vision': 2, 'sst2-emotion': 1, 'sst2-cola': 1, 'signal-vision': 3, 'signal-text': 3, 'where-snr-sst2-emotion': 1,
    'where-snr-sst2-cola': 2, 'eight-tasks': 2, 'language-models': 2}

class TinyTexts(Texts):
    "Texts whose base has random weights, whatever is asked for"
    def find_base(self, tasks, budget, base=None, seed=0, cache=None, progress=True): return tiny_base(cache)

def tiny_vision():
    "The experiment on digits, one setting per method, one share of layers"
    grid = partial(grid_rows, split='held', tops=[50])
    budget = ImageBudget(base_epochs=1, expert_steps=4, max_epochs=2, batch=32, train=128, test=40, calibration=32, width=16)
    return replace(lab_run.vision, load=lambda root, cache=None: digits_tasks(), budgets=dict(full=budget),
        candidates={k: o for k,o in few.items() if k not in ('regmean','matched')}, grid=grid,
        parts=tuple(replace(o, rows=grid) if o.name=='grid' else o for o in lab_run.vision.parts))

tiny_text = TextBudget(steps=60, max_epochs=4, lr=2e-3, batch=32, train=480, test=60, calibration=32)

def tiny_texts(one, *names):
    "The experiment on generated sentences, one setting per method"
    return replace(one, kind=TinyTexts(), load=lambda root, cache=None: generated_texts(names), candidates=few,
        budgets=dict(full=tiny_text))

def tiny_uses(one, *names):
    "One use, of texts"
    found = tiny_texts(one, *names)
    return replace(found, parts=tuple(replace(o, rows=o.rows and partial(tuned_rows, uses=['shrinkage'])) for o in found.parts))

def tiny_many(one, *names):
    "Few settings on few tasks"
    found,two = tiny_texts(one, *names),few | dict(task_arithmetic=[('task_arithmetic', .3), ('task_arithmetic', .5)])
    return replace(found, parts=(found.parts[0], replace(found.parts[1], rows=partial(many_rows, candidates=two)), *found.parts[2:]))

class TinyCompletions(Completions):
    "Decoders whose base has random weights, whatever is asked for"
    def find_base(self, tasks, budget, base=None, seed=0, cache=None, progress=True):
        return super().find_base(tasks, budget, tiny_decoder(Path(cache or cache_dir())/'decoder', load_tokenizer(tiny_base(cache).path)))

def tiny_spoken(one):
    "Few methods on three made-up tasks"
    budget = CompletionBudget(steps=10, lr=3e-3, batch=16, train=120, test=30, held=30, calibration=20, tokens=32)
    methods = dict(ridge_mean=[('ridge_mean(eps=0.1)', 1.)], matched=[('match(ridge=0.3)', None)])
    many = replace(one.parts[1], rows=partial(many_rows, sizes=(3,), candidates=methods))
    return replace(one, kind=TinyCompletions(), load=lambda root, cache=None: generated_texts(('SST-2','Emotion','Newsgroups')),
        budgets=dict(full=budget), parts=(one.parts[0], many))

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')

@pytest.fixture
def tiny(monkeypatch, cache):
    "What the lessons import, made small"
    real,recipes = lab_run.run,inside.rough_budgets
    def run(one, *args, **how):
        fewer = dict(seeds=seeds[one.name]) if 'seeds' in how else {}
        return real(one, *args, **how | fewer)
    vision,pairs = tiny_vision(),(('SST-2', 'Emotion'), ('SST-2', 'CoLA'))
    for k,o in dict(run=run, vision=vision, sst2_emotion=tiny_texts(lab_run.sst2_emotion, 'SST-2', 'Emotion'),
            sst2_cola=tiny_texts(lab_run.sst2_cola, 'SST-2', 'CoLA'),
            signal_vision=replace(lab_run.signal_vision, load=vision.load, budgets=vision.budgets),
            signal_text=tiny_texts(lab_run.signal_text, 'SST-2', 'Emotion', 'CoLA'),
            eight_tasks=tiny_many(lab_run.eight_tasks, 'SST-2', 'Newsgroups', 'CoLA', 'Reuters'),
            language_models=tiny_spoken(lab_run.language_models),
            where_snr=[tiny_uses(o, *names) for o,names in zip(lab_run.where_snr[1:], pairs)]).items():
        monkeypatch.setattr(lab_run, k, o)
    for place,k,o in [(lab_tasks, 'load_texts', generated_texts), (lab_texts, 'find_base', lambda *_: tiny_base(cache)),
            (lab_texts, 'full_text', tiny_text)]: monkeypatch.setattr(place, k, o)
    monkeypatch.setattr(inside, 'rough_budgets', lambda b: dict(list(recipes(b).items())[:1]))
    for k in 'SPECTRUM_DATA','SPECTRUM_CACHE': monkeypatch.setenv(k, str(cache))

def code_cells(nb): return [c for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']

def runnable(source):
    "A cell without what only real numbers fulfil: assertions that compare with a number"
    return re.sub(r'^( *)assert .*[<>]=? *-?\.?\d.*$|^( *)assert .*<.*$', r'\1\2pass', source, flags=re.M)

def run_cell(source, names):
    "Run a cell; the value of its last line, where that is an expression"
    *body,last = ast.parse(source).body
    if not isinstance(last, ast.Expr): body,last = [*body,last],None
    exec(compile(ast.Module(body, []), '<cell>', 'exec'), names)
    return last and eval(compile(ast.Expression(last.value), '<cell>', 'eval'), names)

_called = {'SST-2': 'praise', 'CoLA': 'word order', 'Emotion': 'feelings', 'Newsgroups': 'which thing', 'Tweets': 'praise', 'FashionMNIST': 'digits 0-4', 'KMNIST': 'digits 5-9'}

def stored_columns(cell):
    "Columns of the table that a cell keeps, under the names of the tiny tasks"
    for o in cell['outputs']:
        if head := re.search(r'<thead>(.*?)</thead>', ''.join(o.get('data', {}).get('text/html', '')), re.S):
            found = [html.unescape(k) for k in re.findall(r'<th>(.*?)</th>', head[1])]
            return [re.sub('|'.join(_called), lambda m: _called[m[0]], k) for k in found if k]

def shown(value): return [str(k) for k in (value.reset_index() if value.index.name else value)]

# Columns of tasks that the tiny run leaves out
fewer = {'07_eight_tasks': {'6 tasks', '8 tasks', *(_called.get(o, o) for o in eight)}}

@pytest.mark.parametrize('nb', [o for o in sorted(lessons.glob('*.ipynb')) if code_cells(o)], ids=lambda o: o.stem)
def test_every_cell_runs(nb, tiny):
    "Slow cells show tables with the stored columns, pictures where pictures are stored, a panel"
    names,slow = {},0
    for c in code_cells(nb):
        source = ''.join(c['source'])
        value = run_cell(runnable(source), names)
        if not source.startswith('#| slow'): continue
        slow += 1
        kinds = {k for o in c['outputs'] for k in o.get('data', {}) if o['output_type']=='execute_result'}
        if 'text/html' in kinds:
            absent = set(stored_columns(c)) - {'seed', value.columns.name, *shown(value)} - fewer.get(nb.stem, set())
            assert absent <= (set() if 'res' not in names or len(names['res'].seeds)>1 else {'lo', 'hi'}), source
        for kind,has in {'image/png': '_repr_mimebundle_', 'text/markdown': '_repr_markdown_'}.items():
            if kind in kinds: assert hasattr(value, has), source
    assert slow >= (10 if 'signal' in nb.stem else 20 if 'res' in names else 5)
