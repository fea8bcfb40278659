"Training survives a kill, the cache knows its models, data are found or refused, networks are judged as they are."
import os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import pytest, torch, torchvision
from spectrum_merging.files import digest
from spectrum_merging.lab import images
from spectrum_merging.lab.convolutions import Folded, prepare, resnet18
from spectrum_merging.lab.images import ImageBudget, make_base, make_expert, make_experts, predict, train
from spectrum_merging.lab.run import new_folder
from spectrum_merging.lab.tasks import digits_tasks, load_images
from spectrum_merging.lab.training import Base

tiny = ImageBudget(base_epochs=1, expert_steps=20, max_epochs=4, batch=32, width=16)

@pytest.fixture(scope='module')
def tasks(): return {k: t.limit(160, 60) for k,t in digits_tasks().items()}

killed = '''
import sys, torch
from spectrum_merging.lab.convolutions import resnet18
from spectrum_merging.lab.images import cached, train
from spectrum_merging.lab.tasks import digits_tasks
t = next(iter(digits_tasks().values())).limit(160, 60)
def make(tmp): return train(resnet18(5, width=16), t.x, t.y, epochs=int(sys.argv[2]), batch=32, resume=tmp,
    progress=False)
cached(dict(test='kill'), make, sys.argv[1])
'''

def test_kill_and_resume(tmp_path, tasks):
    "After kill -9 in mid-training there is no model; the next run goes on to the same weights"
    def run(where):
        return subprocess.Popen([sys.executable, '-c', killed, str(tmp_path/where), '12'])
    p = run('a')
    for _ in range(3000):
        if any((tmp_path/'a').rglob('unfinished.pt')) or p.poll() is not None: break
        time.sleep(.02)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert p.returncode==-signal.SIGKILL
    assert any((tmp_path/'a').rglob('unfinished.pt'))
    assert not any((tmp_path/'a').rglob('model.safetensors'))
    assert run('a').wait()==0 and run('b').wait()==0
    a,b = (next((tmp_path/o).rglob('model.safetensors')).read_bytes() for o in 'ab')
    assert a==b
    assert not any((tmp_path/'a').rglob('unfinished.pt'))

def test_cache_key(tmp_path, tasks):
    "Another seed, budget, base or data makes another model; the same makes none"
    low,high = tasks.values()
    base = make_base(tasks, tiny, cache=tmp_path, progress=False)
    keys = [make_expert(t, b, o, seed, tmp_path, False)[1] for t,b,o,seed in
        [(low, base, tiny, 0), (low, base, tiny, 0), (high, base, tiny, 0), (low, base, tiny, 1),
         (low, base, replace(tiny, expert_steps=5, max_epochs=1), 0),
         (low, replace(base, key='other'), tiny, 0)]]
    assert keys[0]==keys[1] and len(set(keys))==5
    assert len(list(tmp_path.glob('models/*/model.safetensors')))==6

# Made by the code before experiments became data, for a base whose hash is 'b': another digest means that every
# expert is trained again.
def _expert(data, digest, **how): return (dict(kind='expert', version=1, base='b', data=data, epochs=12) | how, digest)
_low,_high = '0ed0f27dee552581','0538f298e08ca655'
_full,_small = dict(lr=.03, batch=128, seed=0),dict(lr=.05, batch=64, seed=1)
frozen = [
    (ImageBudget(), 0, {'digits 0-4': _expert(_low, '028fcd4ae152c3ee', **_full),
        'digits 5-9': _expert(_high, 'bc0e8d4fa4ad45bf', **_full)}),
    (images.small, 1, {'digits 0-4': _expert(_low, 'fc0f6da81f8af317', **_small),
        'digits 5-9': _expert(_high, '4531129eabf69e07', **_small)})]

@pytest.mark.parametrize('budget,seed,want', frozen)
def test_experts_of_before_are_found(budget, seed, want):
    "Recipes of trained experts, and so their places in the cache, are what they were"
    found = {k: images._recipe(t, 'b', budget, seed) for k,t in digits_tasks().items()}
    assert found=={k: r for k,(r,_) in want.items()}
    assert {k: digest(r) for k,r in found.items()}=={k: d for k,(_,d) in want.items()}
    other = images._recipe(digits_tasks()['digits 0-4'], 'b', replace(budget, width=32), seed)
    assert other==found['digits 0-4'] | dict(width=32)

def test_base_of_before_is_found(monkeypatch):
    "The recipe of the base is what it was"
    seen = []
    monkeypatch.setattr(images, 'cached', lambda recipe, make, cache: seen.append(recipe) or ({}, digest(recipe)))
    base = make_base(digits_tasks(), ImageBudget(), seed=1)
    assert isinstance(base, Base) and seen==[dict(kind='rotation', version=1, data='a34b5cc77b366892',
        epochs=4, lr=.05, batch=128, seed=1)] and base.key=='9fcf8ccd83de0125'

def test_base_from_file(tmp_path, tasks):
    from safetensors.torch import save_file
    sd = {k: v.contiguous() for k,v in resnet18(7).state_dict().items()}
    save_file(sd, tmp_path/'base.safetensors')
    got = make_base(tasks, base=str(tmp_path/'base.safetensors')).state
    assert got['conv1.weight'].equal(sd['conv1.weight'])
    with pytest.raises(FileNotFoundError, match="pass 'rotation', 'imagenet' or an existing"):
        make_base(tasks, base='nowhere')
    with pytest.raises(ValueError, match="not ResNet-18's: conv1.weight"):
        resnet18(7, {'conv.weight': sd['conv1.weight']})

def test_data_root(tmp_path, monkeypatch):
    monkeypatch.delenv('SPECTRUM_DATA', raising=False)
    with pytest.raises(FileNotFoundError, match='no FashionMNIST/raw and no KMNIST/raw'):
        load_images(tmp_path)
    monkeypatch.setenv('SPECTRUM_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='unset SPECTRUM_DATA'): load_images()

def test_fallback_says_so(tmp_path, monkeypatch, capsys):
    "No data and no network: the digits, and a line that says why"
    monkeypatch.delenv('SPECTRUM_DATA', raising=False)
    def offline(*args, **kwargs): raise OSError('network unreachable')
    monkeypatch.setattr(torchvision.datasets, 'FashionMNIST', offline)
    assert list(load_images(cache=tmp_path))==['digits 0-4','digits 5-9']
    assert "network unreachable" in capsys.readouterr().out

@pytest.mark.skipif('SPECTRUM_DATA' not in os.environ, reason='no SPECTRUM_DATA')
def test_real_data():
    fashion,kmnist = load_images().values()
    assert fashion.x.shape[1:]==(1, 32, 32) and len(fashion.test_x)==len(kmnist.test_x)==10_000
    assert fashion.classes==kmnist.classes==10

def test_digits_split(tasks):
    "No image is in both the training and the test set"
    for t in digits_tasks().values():
        train_set = {o.numpy().tobytes() for o in t.x}
        assert sum(o.numpy().tobytes() in train_set for o in t.test_x) <= 1
        assert t.x.dtype==torch.uint8 and prepare(t.x[:2]).shape==(2, 3, 32, 32)

def test_too_few_images(tasks):
    with pytest.raises(ValueError, match='160 images are fewer than one batch of 500'):
        train(resnet18(5), next(iter(tasks.values())).x, epochs=1, batch=500)

def test_predict_in_parts(tasks):
    "Predictions do not depend on how images are split into batches"
    x = digits_tasks()['digits 0-4'].x[:510]
    model = resnet18(5)
    assert predict(model, x).equal(torch.cat([predict(model, x[:500]), predict(model, x[500:])]))

def test_results_are_not_overwritten(tmp_path):
    (tmp_path/'full').mkdir()
    (tmp_path/'full/x').touch()
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileExistsError, match='choose another|choose a new'):
        new_folder(tmp_path/'full', 'vision')
    assert new_folder(tmp_path/'empty', 'vision')==tmp_path/'empty'
    assert new_folder(None, 'vision').parent==Path('results')

def test_one_image_limit_alone():
    task = digits_tasks()['digits 0-4']
    assert len(task.limit(test=7).test_x)==7 and len(task.limit(test=7).x)==len(task.x)

def test_digest_sees_values_dtype_and_shape():
    a = torch.arange(4.)
    same = [a, a.clone(), a.to(torch.bfloat16), a.view(2, 2), a+1, torch.tensor(1.)]
    assert len({digest(o) for o in same})==5

big = '''
import sys
from spectrum_merging.lab.images import *
from spectrum_merging.lab.tasks import digits_tasks
t = digits_tasks()
b = ImageBudget(base_epochs=1, expert_steps=240, max_epochs=100, batch=16, width=16)
base = make_base({k: o.limit(320) for k,o in t.items()}, b, cache=sys.argv[1], progress=False)
make_experts([(o.limit(320), b, 0) for o in t.values()], base, sys.argv[1], False, n_workers=2)
'''

def test_children_end_with_their_parent(tmp_path):
    "Experts trained side by side: kill -9 of the parent ends the children; the rest is reused"
    p = subprocess.Popen([sys.executable, '-c', big, tmp_path])
    for _ in range(6000):
        if len(list(tmp_path.rglob('unfinished.pt')))>=2 or p.poll() is not None: break
        time.sleep(.02)
    kids = subprocess.run(['pgrep','-P',str(p.pid)], capture_output=True, text=True).stdout.split()
    assert kids
    p.kill()
    p.wait()
    for _ in range(100):
        if not any(Path(f'/proc/{k}').exists() for k in kids): break
        time.sleep(.1)
    assert not any(Path(f'/proc/{k}').exists() for k in kids)
    assert subprocess.run([sys.executable, '-c', big, tmp_path]).returncode==0
    assert len(list(tmp_path.rglob('model.safetensors')))==3

def test_child_error_is_told(tmp_path):
    tasks = {k: t.limit(96) for k,t in digits_tasks().items()}
    b = replace(tiny, expert_steps=110, max_epochs=100, lr=1e30, batch=8)
    base = make_base(tasks, tiny, cache=tmp_path, progress=False)
    with pytest.raises(ValueError, match='diverged.*lower lr'):
        make_experts([(t, b, 0) for t in tasks.values()], base, tmp_path, False, n_workers=2)
