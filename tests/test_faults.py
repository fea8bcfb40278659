"Whatever call of the system goes wrong, at whatever moment: never a wrong folder, finished work is kept, a message that helps."
import json, os, random, shutil, signal, subprocess, sys, time
import numpy as np, pytest
from hashlib import sha256
from pathlib import Path
from safetensors.numpy import save_file
from spectrum_merging.plan import make_plan

here = Path(__file__).parent
full,disk = ['ENOSPC','EDQUOT'],['EIO','EINTR']

# What goes wrong with each call; where a call is made often, the first, the middle and the last one (all of them with --long).
table = dict(
    making=[('mkdir', full+disk+['EACCES','kill','after']), ('open', full+disk+['EMFILE','EROFS','kill']), ('flock', ['ENOLCK','EIO','kill']),
        ('posix_fallocate', full+['EIO','kill','EOPNOTSUPP']), ('pipe', ['EMFILE']), ('fork', ['EAGAIN','ENOMEM','kill'])],
    writing=[('pwrite', full+disk+['EFBIG','kill','after','short','torn']), ('write', full+disk+['kill','after','short'])],
    syncing=[('fdatasync', full+disk+['kill','after']), ('fsync', full+disk+['EINVAL','kill','after'])],
    finishing=[('fopen', full+disk+['kill']), ('fopen2', ['EIO','kill']), ('copyfile', full+['EIO','kill','after']), ('replace', ['EIO','kill','after'])],
    naming=[('rename', ['ENOTEMPTY','ENOTDIR','EIO','EACCES','kill','after']), ('unlink', ['EIO','kill','after']), ('rmdir', ['EIO','kill','after'])],
    resuming=[('ftruncate', ['EIO','kill']), ('lseek', ['EIO','kill']), ('pread', disk+['kill']), ('listdir', ['EIO','kill'])])
cases = [(k, resumed) for k in table for resumed in (False, True)]

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('SPECTRUM_CACHE', str(tmp_path/'.cache'))
    monkeypatch.setenv('PYTHONPATH', str(here.parent), prepend=os.pathsep)
    for seed,k in enumerate('ab'):
        rng = np.random.default_rng(seed)
        sd = {f'l{i}.weight': rng.standard_normal((60, 400)).astype('f4') for i in range(4)}
        (tmp_path/'in'/k).mkdir(parents=True)
        save_file(sd | {'fc.weight': rng.standard_normal((3, 400)).astype('f4')}, tmp_path/'in'/k/'model.safetensors')
        (tmp_path/'in'/k/'config.json').write_text(json.dumps(dict(name='b')))
    make_plan('standard', {k: tmp_path/'in'/k for k in 'ab'}).save(tmp_path/'p.csv')
    return tmp_path

@pytest.mark.parametrize('group,resumed', cases, ids=[f"{k}{'-resumed'*r}" for k,r in cases])
def test_one_fault(group, resumed, home, request):
    "A merge, or one that continues, with one call that fails, is cut short or is the last; then the same command once more"
    long = request.config.getoption('--long')
    # as one process, so that all calls count; as two workers where it is they who write
    wanted = [[call, effects, resumed, workers, long] for call,effects in table[group]
        for workers in ((1, 2) if call=='pwrite' or long else (2,) if call in ('pipe', 'fork', 'write') else (1,))]
    p = subprocess.run([sys.executable, here/'faulty.py', home, json.dumps(wanted)], capture_output=True, text=True)
    found = [json.loads(o) for o in p.stdout.splitlines()]
    assert not p.returncode, p.stderr
    assert not [o for o in found if o[-1]]
    assert {o[0] for o in found}=={o[0] for o in table[group]} and sum(o[2]>0 for o in found)>=len(found)/2

slow = '''
import sys, time
from spectrum_merging import folder, stream
from spectrum_merging.merge import merge
from spectrum_merging.plan import Plan
stream.PIECE, folder.FLUSH = 1<<11, 1<<14
real = stream._run_piece
def run(*a):
    time.sleep(.02)
    return real(*a)
stream._run_piece = run
d = sys.argv[1]
merge(Plan.load(f'{d}/p.csv'), {k: f'{d}/in/{k}' for k in 'ab'}, out=f'{d}/{sys.argv[2]}', n_workers=2)
'''

def files(d): return {o.relative_to(d).as_posix(): sha256(o.read_bytes()).hexdigest() for o in d.rglob('*') if o.is_file()}

def test_kills(home, request):
    "kill -9 at random moments, parent and workers together or the parent alone; in the end the same bytes"
    def start(out): return subprocess.Popen([sys.executable, '-c', slow, home, out], start_new_session=True)
    begun = time.time()
    assert start('ref').wait()==0
    took,rng,kills,i = time.time()-begun,random.Random(0),0,0
    while kills<(50 if request.config.getoption('--long') else 6):
        p = start(f'out{i}')
        time.sleep(rng.uniform(.2, 1)*took)
        if rng.random()<.5: p.kill()
        elif p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
        kills += p.wait()==-9
        if not (home/f'out{i}').exists(): continue
        assert files(home/f'out{i}')==files(home/'ref')
        i += 1
    if not (home/f'out{i}').exists(): assert start(f'out{i}').wait()==0
    assert files(home/f'out{i}')==files(home/'ref')
