"Training survives a kill, the cache knows its models, data are found or refused, results are kept."
import os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from spectrum_merging import vision
from spectrum_merging.run import new_folder
from spectrum_merging.vision import (Budget, digits_tasks, load_tasks, make_base, make_expert,
    predict, prepare, resnet18, train)

tiny = Budget(base_epochs=1, expert_steps=20, max_epochs=4, batch=32)

@pytest.fixture(scope='module')
def tasks(): return {k: t.limit(160, 60) for k,t in digits_tasks().items()}

killed = '''
import sys, torch
from spectrum_merging.vision import cached, digits_tasks, resnet18, train
t = next(iter(digits_tasks().values())).limit(160, 60)
def make(tmp): return train(resnet18(5), t.x, t.y, epochs=int(sys.argv[2]), batch=32, resume=tmp,
    progress=False)
cached(dict(test='kill'), make, sys.argv[1])
'''

def test_kill_and_resume(tmp_path, tasks):
    "After kill -9 in mid-training there is no model; the next run goes on to the same weights"
    def run(where):
        return subprocess.Popen([sys.executable, '-c', killed, str(tmp_path/where), '6'])
    p = run('a')
    for _ in range(600):
        if any((tmp_path/'a').rglob('unfinished.pt')) or p.poll() is not None: break
        time.sleep(.1)
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
         (low, base, Budget(base_epochs=1, expert_steps=5, max_epochs=1, batch=32), 0),
         (low, (base[0], 'other'), tiny, 0)]]
    assert keys[0]==keys[1] and len(set(keys))==5
    assert len(list(tmp_path.glob('models/*/model.safetensors')))==6

def test_base_from_file(tmp_path, tasks):
    from safetensors.torch import save_file
    sd = {k: v.contiguous() for k,v in resnet18(7).state_dict().items()}
    save_file(sd, tmp_path/'base.safetensors')
    got,_ = make_base(tasks, base=str(tmp_path/'base.safetensors'))
    assert got['conv1.weight'].equal(sd['conv1.weight'])
    with pytest.raises(FileNotFoundError, match="pass 'rotation', 'imagenet' or an existing"):
        make_base(tasks, base='nowhere')
    with pytest.raises(ValueError, match="not ResNet-18's: conv1.weight"):
        resnet18(7, {'conv.weight': sd['conv1.weight']})

def test_data_root(tmp_path, monkeypatch):
    monkeypatch.delenv('SPECTRUM_DATA', raising=False)
    with pytest.raises(FileNotFoundError, match='no FashionMNIST/raw and no KMNIST/raw'):
        load_tasks(tmp_path)
    monkeypatch.setenv('SPECTRUM_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='unset SPECTRUM_DATA'): load_tasks()

def test_fallback_says_so(tmp_path, monkeypatch, capsys):
    "No data and no network: the digits, and a line that says why"
    monkeypatch.delenv('SPECTRUM_DATA', raising=False)
    def offline(*args, **kwargs): raise OSError('network unreachable')
    monkeypatch.setattr(vision.torchvision.datasets, 'FashionMNIST', offline)
    assert list(load_tasks(cache=tmp_path))==['digits 0-4','digits 5-9']
    assert "network unreachable" in capsys.readouterr().out

@pytest.mark.skipif('SPECTRUM_DATA' not in os.environ, reason='no SPECTRUM_DATA')
def test_real_data():
    fashion,kmnist = load_tasks().values()
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
    with pytest.raises(FileExistsError, match='choose another'):
        new_folder(tmp_path/'full', 'vision')
    assert new_folder(tmp_path/'empty', 'vision')==tmp_path/'empty'
    assert new_folder(None, 'vision').parent==Path('results')

def test_one_image_limit_alone():
    task = digits_tasks()['digits 0-4']
    assert len(task.limit(test=7).test_x)==7 and len(task.limit(test=7).x)==len(task.x)

def test_digest_sees_values_dtype_and_shape():
    a = torch.arange(4.)
    same = [a, a.clone(), a.to(torch.bfloat16), a.view(2, 2), a+1, torch.tensor(1.)]
    assert len({vision.digest(o) for o in same})==5
