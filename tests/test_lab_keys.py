"Predictions are kept under everything they depend on: nothing stale is served, nothing is computed twice."
import shutil
from collections import OrderedDict
from dataclasses import dataclass, replace
import numpy as np, pytest, torch
from torch import nn
from spectrum_merging.lab.merges import Lab, Merge
from spectrum_merging.lab.tasks import Task, generated_texts
from spectrum_merging.lab.texts import TextBudget, Texts, find_base, text_expert, tiny_base
from spectrum_merging.lab.training import Base, Kind
from spectrum_merging.rules import rules

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "So that sums are the same, whichever process ran before"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture
def calls(monkeypatch):
    "Tasks whose logits were computed"
    seen,real = [],Kind.logits
    monkeypatch.setattr(Kind, 'logits', lambda self, *args: seen.append(self.name) or real(self, *args))
    return seen

def same(a, b): return all(np.array_equal(z, b[t][h]) for t,o in a.items() for h,z in o.items())

# --- A third kind, as small as can be

@dataclass(frozen=True)
class Effort:
    train:int=None # Training vectors per task
    test:int=None # Test vectors per task
    calibration:int=40 # Unlabelled vectors per task

def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(OrderedDict(body=nn.Linear(6, 8), act=nn.ReLU(), last=nn.Linear(8, 8), on=nn.ReLU(),
            head=nn.Linear(8, 3)))

class Vectors(Kind):
    "Networks that are what they are, without training"
    name = 'vectors'
    def __init__(self, first=1, version=1): self.first,self.version = first,version
    def find_base(self, tasks, budget, base=None, seed=0, cache=None, progress=True): return start(0)
    def train(self, jobs, base, cache=None, progress=True): return [network(self.first+i) for i,_ in enumerate(jobs)]
    def prepare(self, lab, x): return [(range(len(x)), x)]

def start(seed, key='b'):
    return Base('here', {k: v for k,v in network(seed).state_dict().items() if k[:4]!='head'}, key)

def vectors(name, seed):
    g = torch.Generator().manual_seed(seed)
    x,y = torch.randn(160, 6, generator=g),torch.randint(0, 3, (160,), generator=g)
    return Task(name, x[:100], y[:100], x[100:], y[100:], 'made up', items='vectors')

tasks = dict(one=vectors('one', 0), two=vectors('two', 1))
def with_one(**how): return tasks | dict(one=replace(tasks['one'], **how))

def lab(cache, kind=None, tasks=tasks, budget=Effort(), base=None, seed=0):
    return Lab(kind or Vectors(), tasks, budget, base, seed, cache, progress=False)

def arithmetic(lab): return Merge(lab.plan('task_arithmetic', scale=.4))
def matched(lab): return lab.average().then('match(ridge=0.01)', 30, 1)
def chained(lab): return lab.average().then('match').then('refit')
def regmean(lab): return Merge(lab.plan('regmean', scale=1.))
def ties(lab): return Merge(lab.plan('ties(density=0.5)', scale=1.))
def raised(name): return lambda patch: patch.setitem(rules, name, replace(rules[name], version=rules[name].version+1))

# What is changed: (what it is, the merge before, the merge after, the lab after, what else is done)
lab_changes = [
    ('weights of the base', arithmetic, dict(base=start(99))),
    ('name of the base', arithmetic, dict(base=start(0, 'with another tokenizer'))),
    ('experts', arithmetic, dict(kind=Vectors(first=2))),
    ('version of the kind', arithmetic, dict(kind=Vectors(version=2))),
    ('seed of the inputs', matched, dict(seed=1)),
    ('calibration', regmean, dict(budget=Effort(calibration=50))),
    ('calibration of a repair', chained, dict(budget=Effort(calibration=50))),
    ('test inputs', arithmetic, dict(tasks=with_one(test_x=tasks['two'].test_x))),
    ('number of test inputs', arithmetic, dict(budget=Effort(test=20))),
    ('inputs that are looked at', matched, dict(tasks=with_one(x=tasks['two'].x))),
    ('order of the tasks', arithmetic, dict(tasks=dict(reversed(tasks.items())))),
    ('names of the tasks', arithmetic, dict(tasks=dict(uno=tasks['one'], due=tasks['two'])))]

merge_changes = [
    ('ridge', matched, lambda lab: lab.average().then('match(ridge=0.02)', 30, 1)),
    ('number of inputs', matched, lambda lab: lab.average().then('match(ridge=0.01)', 31, 1)),
    ('draw of inputs', matched, lambda lab: lab.average().then('match(ridge=0.01)', 30, 2)),
    ('choice of a repair', matched, lambda lab: lab.average().then('match(statistics=per task, ridge=0.01)', 30, 1)),
    ('another repair', chained, lambda lab: lab.average().then('match')),
    ('order of repairs', chained, lambda lab: lab.average().then('refit').then('match')),
    ('repaired at all', matched, lambda lab: lab.average()),
    ('scale', arithmetic, lambda lab: Merge(lab.plan('task_arithmetic', scale=.5))),
    ('setting of an operation', ties, lambda lab: Merge(lab.plan('ties(density=0.6)', scale=1.))),
    ('setting of an operation with extra data', regmean, lambda lab: Merge(lab.plan('regmean(alpha=0.8)', scale=1.))),
    ('source', lambda lab: lab.alone('one'), lambda lab: lab.alone('two')),
    ('start', lambda lab: Merge('base').then('refit'), lambda lab: lab.alone('one').then('refit'))]

version_changes = [('match', matched), ('match', chained), ('refit', chained), ('regmean', regmean), ('ties', ties)]

def check(tmp_path, calls, before, after=None, changed={}, do=None):
    "Computed once; after a change anew, as it would be without a cache; and once only"
    own = lab(tmp_path/'cache')
    first = own.logits(before(own))
    assert len(calls)==len(tasks)
    for again in own,lab(tmp_path/'cache'): assert same(again.logits(before(again)), first)
    assert len(calls)==len(tasks)
    if do: do()
    other,after = lab(tmp_path/'cache', **changed),after or before
    found = other.logits(after(other))
    assert len(calls)==2*len(tasks), 'something stale is served'
    fresh = lab(tmp_path/'empty', **changed)
    assert same(fresh.logits(after(fresh)), found)
    calls.clear()
    again = lab(tmp_path/'cache', **changed)
    assert same(again.logits(after(again)), found) and not calls
    return first,found

@pytest.mark.parametrize('what,merge,changed', lab_changes, ids=[o[0] for o in lab_changes])
def test_what_a_lab_is_made_of(what, merge, changed, tmp_path, calls): check(tmp_path, calls, merge, changed=changed)

@pytest.mark.parametrize('what,merge,after', merge_changes, ids=[o[0] for o in merge_changes])
def test_what_a_merge_is_made_of(what, merge, after, tmp_path, calls): check(tmp_path, calls, merge, after)

@pytest.mark.parametrize('rule,merge', version_changes, ids=[f'{r}, {m.__name__}' for r,m in version_changes])
def test_version_of_a_rule(rule, merge, tmp_path, calls, monkeypatch):
    "Raised by hand when its results change"
    first,found = check(tmp_path, calls, merge, do=lambda: raised(rule)(monkeypatch))
    assert same(first, found) # of the version alone, nothing comes out otherwise

def test_new_weights_are_no_old_ones(tmp_path, calls):
    "Where something else comes out, something else is returned"
    first,found = check(tmp_path, calls, arithmetic, changed=dict(base=start(99)))
    assert not same(first, found)

def test_splits_and_tasks_apart(tmp_path, calls):
    own = lab(tmp_path)
    m = arithmetic(own)
    whole = own.logits(m)
    held = own.logits(m, 'held')
    alone = own.logits(m, tasks=['two'])
    assert len(calls)==5 and len(held['one']['one'])!=len(whole['one']['one'])
    assert list(alone)==['two'] and np.array_equal(alone['two']['two'], whole['two']['two'])
    again = lab(tmp_path)
    for split,some in ('test', None), ('held', None), ('test', ['two']): again.logits(m, split, some)
    assert len(calls)==5

def test_labels_are_read_anew(tmp_path, calls):
    "Predictions do not depend on labels, scores do"
    own = lab(tmp_path)
    m = arithmetic(own)
    first,n = own.rows(m),len(calls)
    right = {t: own.predict(m)[t] for t in tasks}
    other = lab(tmp_path, tasks={t: replace(o, test_y=torch.as_tensor(right[t])) for t,o in tasks.items()})
    assert [r['accuracy'] for r in other.rows(m)]==[1., 1.] and len(calls)==n
    assert [r['accuracy'] for r in first]!=[1., 1.]

# --- Texts: the tokenizer and how long a sentence may be

tiny = TextBudget(steps=4, max_epochs=1, batch=16, train=64, test=40, calibration=24)

@pytest.fixture(scope='module')
def texts(tmp_path_factory):
    "Tasks, base, folders of experts, and the same with two words exchanged in the tokenizer"
    root = tmp_path_factory.mktemp('texts')
    base,found = tiny_base(root),generated_texts(['SST-2','CoLA'], 64, 40)
    experts = {t: text_expert(o, base, tiny, 0, root, False) for t,o in found.items()}
    def exchanged(folder, name):
        shutil.copytree(folder, root/name)
        file = root/name/'tokenizer.json'
        words = file.read_text().replace('"great"', '"?"').replace('"dull"', '"great"').replace('"?"', '"dull"')
        file.write_text(words)
        return root/name
    swapped = {t: exchanged(f, f'swapped {t}') for t,f in experts.items()}
    return found,base,experts,swapped,exchanged(base.path, 'swapped base')

def text_lab(texts, cache, budget=tiny, kind=None, swap=False, base=None):
    found,own,experts,swapped,_ = texts
    return Lab(kind or Texts(), found, budget, base or own, 0, cache, False, swapped if swap else experts)

class Longer(Texts): tokens = 6
class Newer(Texts): version = 2

@pytest.mark.parametrize('what', ['tokenizer','max_length','tokens','version','base'])
@pytest.mark.parametrize('repair', ['', 'refit'])
def test_text_keys(what, repair, texts, tmp_path, calls):
    "The same weights and sentences, read otherwise"
    changed = dict(tokenizer=dict(swap=True), max_length=dict(budget=replace(tiny, max_length=5)),
        tokens=dict(kind=Longer()), version=dict(kind=Newer()), base=dict(base=find_base(texts[4])))[what]
    own = text_lab(texts, tmp_path/'cache')
    first = own.logits(own.average().then(repair))
    assert len(calls)==2
    for again in own,text_lab(texts, tmp_path/'cache'): assert same(again.logits(again.average().then(repair)), first)
    assert len(calls)==2
    other = text_lab(texts, tmp_path/'cache', **changed)
    found = other.logits(other.average().then(repair))
    assert len(calls)==4, 'something stale is served'
    fresh = text_lab(texts, tmp_path/'empty', **changed)
    assert same(fresh.logits(fresh.average().then(repair)), found)
    if what in ('tokenizer','max_length'): assert not same(first, found)
    calls.clear()
    again = text_lab(texts, tmp_path/'cache', **changed)
    assert same(again.logits(again.average().then(repair)), found) and not calls
