"Text tasks and experts: data from a folder, training that survives a kill, errors, predictions."
import json, numpy as np, os, pytest, shutil, signal, subprocess, sys, time, torch
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification
from spectrum_merging.files import digest
from spectrum_merging.lab import tasks as data, texts
from spectrum_merging.lab.tasks import generated_texts, load_texts
from spectrum_merging.lab.texts import (Padded, TextBudget, WeightMean, balanced_loss, find_base, full_text,
    load_classifier, load_tokenizer, quick_text, text_batches, text_expert, text_experts, tiny_base,
    whole_checkpoint)
from spectrum_merging.lab.training import logits_of_heads
from spectrum_merging.merge import load_task, merge
from spectrum_merging.plan import make_plan
from spectrum_merging.units import is_head

def text_logits(module, batches):
    "(n, classes) logits under a classifier's own head"
    own = {'own': {k: v for k,v in module.state_dict().items() if is_head(k)}}
    return logits_of_heads(Padded(module), own, batches, module)['own']

small = TextBudget(steps=150, max_epochs=15, lr=2e-3, batch=32, train=320)

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')
@pytest.fixture(scope='module')
def base(cache): return tiny_base(cache)
@pytest.fixture(scope='module')
def tasks(): return {k: t.limit(320) for k,t in generated_texts(['SST-2','CoLA','Emotion']).items()}
@pytest.fixture(scope='module')
def experts(tasks, base, cache):
    return dict(zip(tasks, text_experts([(t, small, 0) for t in tasks.values()], base, cache, False)))

def write_sets(root, n=40):
    "Data sets in the hub's layout"
    import datasets
    rng = np.random.default_rng(0)
    def rows(k, column): return {column: [f'sentence {i}' for i in range(n)], 'label': rng.integers(0, k, n).tolist()}
    for folder,config,column,names in (('glue','sst2','sentence',['negative','positive']),
            ('glue','cola','sentence',['no','yes']), ('emotion','split','text',list('abcdef'))):
        d = root/folder/config
        d.mkdir(parents=True)
        f = datasets.Features({column: datasets.Value('string'), 'label': datasets.ClassLabel(names=names)})
        for split in ('train','validation'):
            datasets.Dataset.from_dict(rows(len(names), column), features=f).to_parquet(
                d/f'{split}-00000-of-00001.parquet')
    for folder,configs in (('glue',['sst2','cola']), ('emotion',['split'])):
        text = '---\nconfigs:\n' + ''.join(f'- config_name: {c}\n  data_files:\n' + ''.join(
            f'  - split: {s}\n    path: {c}/{s}-*\n' for s in ('train','validation')) for c in configs) + '---\n'
        (root/folder/'README.md').write_text(text)

def test_sets_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path/'hf'))
    write_sets(tmp_path)
    t = load_texts(['SST-2','CoLA','Emotion'], tmp_path)
    assert [o.classes for o in t.values()]==[2, 2, 6] and t['CoLA'].metric=='mcc'
    assert all(len(o.x)==len(o.y)==40 for o in t.values()) and t['Emotion'].names==tuple('abcdef')
    with pytest.raises(FileNotFoundError, match='no glue/sst2 and no emotion/split'):
        load_texts(root=tmp_path/'glue')
    with pytest.raises(ValueError, match="'MNLI' is unknown"): load_texts(['MNLI'], tmp_path)

@pytest.mark.skipif('SPECTRUM_DATA' not in os.environ, reason='needs the real data')
def test_real_sets():
    t = load_texts(['SST-2','CoLA','Emotion'])
    assert [len(o.test_x) for o in t.values()]==[872, 1043, 2000]
    assert abs(np.bincount(t['CoLA'].test_y).max()/1043-.689) < .005

def test_no_data_no_hub(monkeypatch, capsys):
    monkeypatch.delenv('SPECTRUM_DATA', raising=False)
    def fail(*_): raise ConnectionError('no route\nto host')
    monkeypatch.setattr(data, '_load_set', fail)
    assert list(load_texts(['SST-2','CoLA']))==['praise','word order']
    assert 'no hub (no route): using generated' in capsys.readouterr().out

def test_held_out_is_apart(tasks):
    for t in tasks.values():
        t = t.limit(100)
        a,b = t.hold_out(share=20, shuffle=True),t.hold_out(5, 20, True)
        assert (len(a.x), len(a.held_x), len(b.held_x))==(95, 5, 5)
        assert sorted(a.x+a.held_x)==sorted(t.x) and a.held_x==t.hold_out(share=20, shuffle=True).held_x
        found = list(zip(a.x+a.held_x, np.r_[a.y, a.held_y]))
        assert sorted(found)==sorted(zip(t.x, t.y))

@pytest.mark.parametrize('size', [1, 7, 64])
def test_logits_in_order_without_padding_effects(experts, tasks, size):
    m,tok,x = load_classifier(experts['feelings']),load_tokenizer(experts['feelings']),tasks['feelings'].test_x[:50]
    z = text_logits(m, text_batches(tok, x, size))
    with torch.inference_mode(): want = torch.cat([m(**tok(o, return_tensors='pt')).logits for o in x])
    assert z.shape==(50, 6) and (z-want).abs().max() < .1
    assert (z.argmax(1)==want.argmax(1)).float().mean() > .95

def test_experts_learn_and_are_found_again(experts, tasks, base, cache):
    tok = load_tokenizer(base.path)
    for k,f in experts.items():
        z = text_logits(load_classifier(f), text_batches(tok, tasks[k].test_x))
        assert (z.argmax(1).numpy()==tasks[k].test_y).mean() > np.bincount(tasks[k].test_y).max()/len(z)-.05
        before = (f/'model.safetensors').stat().st_mtime_ns
        assert text_expert(tasks[k], base, small, 0, cache, False)==f
        assert (f/'model.safetensors').stat().st_mtime_ns==before
        assert json.loads((f/'recipe.json').read_text())['kind']=='text expert'
    assert len({f for f in experts.values()})==3
    assert text_expert(tasks['praise'], base, small, 1, cache, False)!=experts['praise']

# Made by the code before experiments became data, for a base whose hash is 'b': another digest means that every
# expert is trained again.
_data = {'praise': '3353571d311d3e23', 'word order': 'ac4e832f93220c1e', 'feelings': 'c1a2e64269ea7654'}
frozen = [(full_text, 0, dict(epochs=10, lr=1e-4, batch=64, seed=0, max_length=128),
        ['da0998f7462670ff','ea939c1c828d6212','11b20ceb5e3c26bd']),
    (quick_text, 1, dict(epochs=6, lr=2e-4, batch=64, seed=1, max_length=128),
        ['4b3ed1edf463624b','c906b3763095294c','15d9b89ac0d85345'])]

@pytest.mark.parametrize('budget,seed,how,digests', frozen)
def test_experts_of_before_are_found(budget, seed, how, digests):
    "Recipes of trained experts, and so their places in the cache, are what they were"
    found = [texts._recipe(t, SimpleNamespace(key='b'), budget, seed)
        for t in generated_texts(['SST-2','CoLA','Emotion']).values()]
    assert found==[dict(kind='text expert', version=4, base='b', data=d, balanced=t=='word order') | how
        for t,d in _data.items()]
    assert list(map(digest, found))==digests

long = '''
import sys
from spectrum_merging.lab.tasks import generated_texts
from spectrum_merging.lab.texts import *
b = TextBudget(steps=400, max_epochs=40, lr=1e-3, batch=32)
t = generated_texts(['SST-2'])['praise'].limit(320)
print(text_expert(t, tiny_base(sys.argv[1]), b, 0, sys.argv[1], False))
'''

def test_killed_and_continued(tmp_path):
    "Ended by force after a checkpoint, and a half-written one beside it: it goes on and ends the same"
    whole,part = tmp_path/'whole',tmp_path/'part'
    env = os.environ | dict(OMP_NUM_THREADS='1')
    p = subprocess.Popen([sys.executable, '-c', long, part], env=env)
    for _ in range(1800):
        done = list(part.rglob('checkpoint-*/mean.safetensors'))
        if done or p.poll() is not None: break
        time.sleep(.05)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert done and not list(part.rglob('expert'))
    broken = done[0].parents[1]/'checkpoint-100000'
    broken.mkdir()
    (broken/'trainer_state.json').write_text('{"epoch": 1')
    assert whole_checkpoint(broken.parent).name!=broken.name
    def run(cache):
        return Path(subprocess.run([sys.executable, '-c', long, cache], env=env, check=True,
            capture_output=True, text=True).stdout.strip())
    a,b = (load_classifier(run(c)).state_dict() for c in (part, whole))
    assert not list(part.rglob('unfinished'))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)

def test_two_processes_train_one_expert_once(tmp_path):
    "The second waits for the first, and takes what it made"
    tiny_base(tmp_path/'c')
    env = os.environ | dict(OMP_NUM_THREADS='1')
    ps = [subprocess.Popen([sys.executable, '-c', long, tmp_path/'c'], env=env, text=True,
        stdout=subprocess.PIPE) for _ in range(2)]
    outs = [p.communicate()[0].strip() for p in ps]
    assert [p.returncode for p in ps]==[0, 0] and outs[0]==outs[1]
    assert load_classifier(outs[0]) and not list(tmp_path.rglob('unfinished'))

def test_balanced_loss(tasks):
    "Twice the sentences of a class, half the weight of each"
    t = replace(tasks['word order'], x=('a',)*6, y=np.array([0, 0, 1, 1, 1, 1]))
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    got = balanced_loss(t)(SimpleNamespace(logits=z), torch.tensor(t.y))
    each = torch.nn.functional.cross_entropy(z, torch.tensor(t.y), reduction='none')
    assert torch.isclose(got, (each[:2].mean()+each[2:].mean())/2)
    recipes = {k: texts._recipe(o, SimpleNamespace(key='b'), TextBudget(), 0) for k,o in tasks.items()}
    assert {k for k,r in recipes.items() if r['balanced']}=={'word order'}

def test_divergence_is_told(tasks, base, tmp_path):
    with pytest.raises(ValueError, match='praise diverged.*lower lr'):
        text_expert(tasks['praise'], base, TextBudget(steps=10, max_epochs=1, lr=1e30, batch=64), 0,
            tmp_path, False)
    assert not list(tmp_path.rglob('expert'))

def test_bases(base, tmp_path, cache):
    assert find_base(base.path).key==base.key and tiny_base(cache).key==base.key
    assert not any(k.startswith('classifier') for k in base.state)
    with pytest.raises(OSError): find_base(tmp_path/'nothing')
    shutil.copytree(base.path, tmp_path/'other')
    words = tmp_path/'other'/'tokenizer.json'
    words.write_text(words.read_text().replace('"film"', '"movie"'))
    other = find_base(tmp_path/'other')
    assert other.key!=base.key and all(torch.equal(v, base.state[k]) for k,v in other.state.items())

@pytest.mark.parametrize('rule', ['standard','snr_winner','ridge_mean(eps=0.1)'])
def test_saved_merges_predict_the_same(experts, tasks, base, tmp_path, rule):
    "A merged folder, opened by `from_pretrained`, gives the logits of the merge in memory"
    plan = make_plan(rule, experts, base.state)
    out = merge(plan, experts, base.state, out=tmp_path/'out')
    memory = merge(plan, experts, base.state)
    tok = load_tokenizer(base.path)
    for k,t in tasks.items():
        one,two = load_classifier(out, t.names),load_classifier(experts[k])
        one.load_state_dict(load_task(out, k))
        two.load_state_dict({n.partition('@')[0]: v for n,v in memory.items()
            if '@' not in n or n.endswith(f'@{k}')})
        b = text_batches(tok, t.test_x[:100])
        assert torch.equal(text_logits(one, b), text_logits(two, b))

def test_merged_heads_open_without_help(experts, tasks, base, tmp_path):
    "With one merged head, `from_pretrained` alone gives the merged classifier"
    pair = {k: experts[k] for k in ('praise','word order')}
    full = base.state | {k: v for k,v in load_classifier(pair['praise']).state_dict().items()
        if k.startswith('classifier')}
    plan = make_plan('standard', pair, full, heads=[])
    out,memory = merge(plan, pair, full, out=tmp_path/'out'),merge(plan, pair, full)
    a,b = load_classifier(out),load_classifier(pair['praise'])
    b.load_state_dict(memory)
    x = text_batches(load_tokenizer(out), tasks['praise'].test_x[:50])
    assert torch.equal(text_logits(a, x), text_logits(b, x))

@pytest.mark.parametrize('kind', ['bert','roberta'])
def test_other_encoders(kind, base, tasks, tmp_path):
    "Training starts from any encoder that `AutoModelForSequenceClassification` opens"
    size = dict(vocab_size=load_tokenizer(base.path).vocab_size+4, hidden_size=48, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=96, max_position_embeddings=80)
    c,m = dict(bert=(BertConfig, BertForSequenceClassification),
        roberta=(RobertaConfig, RobertaForSequenceClassification))[kind]
    m(c(**size, pad_token_id=0)).save_pretrained(tmp_path/'base')
    load_tokenizer(base.path).save_pretrained(tmp_path/'base')
    b = find_base(tmp_path/'base')
    two = {k: text_expert(tasks[k], b, TextBudget(steps=5, max_epochs=1, batch=64), 0, tmp_path/'cache', False)
        for k in ('praise','feelings')}
    merged = merge(make_plan('snr_max', two, b.state), two, b.state)
    assert {k.rpartition('@')[2] for k in merged if '@' in k}==set(two)

def test_experts_are_means_of_weights():
    "Over the second half of training, every tenth step; none where training is too short"
    m = torch.nn.Linear(1, 1, bias=False)
    mean = WeightMean(m, 60)
    for i in range(1, 61):
        with torch.no_grad(): m.weight.fill_(i)
        mean.step(i)
    mean.apply()
    assert m.weight.item()==50 # of 40, 50, 60
    short = WeightMean(m, 9)
    for i in range(1, 10): short.step(i)
    short.apply()
    assert m.weight.item()==50
