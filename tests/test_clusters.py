"A scan, a comparison and a sweep on clusters made on this machine: rows as on one machine, also where a node is lost in mid-run."
import os, signal, socket, subprocess, sys, time
from importlib.util import find_spec
from pathlib import Path
import joblib, numpy as np, pandas as pd, pytest, torch
from safetensors.numpy import save_file
from spectrum_merging import __version__, pieces, scan
from spectrum_merging.clusters import on_cluster
from spectrum_merging.pieces import do_piece, send
from test_compare import make

scan_room = sys.modules['spectrum_merging.scan']

class Dask:
    "A scheduler and two workers, each a process; the second core of CI waits while PyTorch is imported in each"
    name = 'dask'
    def __init__(self):
        from distributed import LocalCluster
        self.all = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
        self.address = self.all.scheduler_address
    def lose(self): os.kill(next(iter(self.all.workers.values())).pid, signal.SIGKILL)
    def close(self): self.all.close()

class Ray:
    "Four nodes of one core"
    name = 'ray'
    def __init__(self):
        from ray.cluster_utils import Cluster
        how = dict(num_cpus=1, object_store_memory=80<<20)
        def patient(f, *args, **kwargs):
            "Ray gives a node 30 seconds to start, which is little on busy cores"
            for left in (2, 1, 0):
                try: return f(*args, **kwargs)
                except Exception as e:
                    if not left or 'timed out during startup' not in str(e): raise
        self.all = patient(Cluster, initialize_head=True, head_node_args=how | dict(include_dashboard=False))
        self.nodes = [patient(self.all.add_node, **how) for _ in range(3)]
        self.address = self.all.address
    def lose(self): self.all.remove_node(self.nodes.pop(), allow_graceful=False)
    def close(self): self.all.shutdown()

@pytest.fixture(scope='module', params=[pytest.param(o, id=o.name, marks=pytest.mark.skipif(not find_spec(k), reason=f'needs the extra {o.name}'))
    for o,k in ((Dask, 'distributed'), (Ray, 'ray'))])
def cluster(request):
    with pytest.MonkeyPatch.context() as m:
        # as here: sums depend on the number of threads
        m.setenv('OMP_NUM_THREADS', '1')
        m.setenv('PYTHONPATH', os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')]))
        res = request.param()
        yield res
        res.close()

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)

def losing(cluster, monkeypatch, after=2):
    "A node is lost when so many results have come; a list that says so"
    real,lost = pieces._results,[]
    def results(*args):
        for i,o in enumerate(real(*args)):
            if i==after and not lost:
                cluster.lose()
                lost.append(i)
            yield o
    monkeypatch.setattr(pieces, '_results', results)
    return lost

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "72 matrices, as many as BERT-base has, and an update of rank one in each"
    d,rng = tmp_path_factory.mktemp('models'),np.random.default_rng(0)
    base = {f'layer.{i}.{k}.weight': rng.normal(size=(48+4*j, 64)).astype('f4') for i in range(12) for j,k in enumerate('qkvoud')}
    def tuned(v): return v+.01*rng.normal(size=v.shape).astype('f4')+.3*np.outer(*(rng.normal(size=n)/n**.5 for n in v.shape)).astype('f4')
    save_file(base, d/'base.safetensors')
    save_file({k: tuned(v) for k,v in base.items()}, d/'mood.safetensors')
    return d/'mood.safetensors',d/'base.safetensors'

def test_scan(cluster, models, monkeypatch):
    want = scan(*models, progress=False)
    assert len(want)==72
    with on_cluster(cluster.name, cluster.address):
        pd.testing.assert_frame_equal(scan(*models, progress=False), want, check_exact=True)
        lost = losing(cluster, monkeypatch)
        pd.testing.assert_frame_equal(scan(*models, progress=False), want, check_exact=True)
        assert lost

@pytest.fixture(scope='module')
def apart(tmp_path_factory): return make(tmp_path_factory.mktemp('compared')/'apart', 'electra', False)

def quickly(given, out, cache, **how):
    "A quick comparison with a cache of its own; the table"
    from spectrum_merging.cli import compare_cli
    models,base,data = given
    def words(o): return [f'{k}={v}' for k,v in o.items()]
    with pytest.MonkeyPatch.context() as m:
        m.setenv('SPECTRUM_CACHE', str(cache))
        compare_cli(words(models), str(base), words(data), str(out), quick=True, **how)
    return pd.read_csv(out/'table.csv')

@pytest.fixture(scope='module')
def compared(apart, tmp_path_factory):
    d = tmp_path_factory.mktemp('alone')
    return quickly(apart, d/'out', d/'cache')

def test_compare(cluster, apart, compared, tmp_path, monkeypatch, request):
    # another worker imports PyTorch, which in CI is worth it once: in the sweep
    lose = cluster.name=='ray' or request.config.getoption('--long')
    lost = losing(cluster, monkeypatch, after=0) if lose else []
    found = quickly(apart, tmp_path/'out', tmp_path/'cache', backend=cluster.name, address=cluster.address)
    pd.testing.assert_frame_equal(found, compared, check_exact=True)
    assert bool(lost)==lose and {'merge','repair','SNR','control'} <= {*found.kind}

@pytest.fixture(scope='module')
def parts(request): return ['paper','grid','methods','heads'] if request.config.getoption('--long') else ['heads']

@pytest.fixture(scope='module')
def swept(parts, tmp_path_factory): return sweep(tmp_path_factory.mktemp('swept'), parts)

def sweep(cache, parts):
    "Rows of a vision sweep, training included, and the choice of settings where all parts of a quick run are asked for"
    from test_lab_run import chosen, digits_tasks, run, small_vision, tiny
    return run(small_vision, out=False, tasks=digits_tasks(), budget=tiny, cache=cache, parts=parts, progress=False,
        chosen=None if 'grid' in parts else chosen).rows

def test_sweep(cluster, swept, parts, tmp_path, monkeypatch):
    lost = losing(cluster, monkeypatch)
    with on_cluster(cluster.name, cluster.address): found = sweep(tmp_path, parts)
    pd.testing.assert_frame_equal(found, swept, check_exact=True)
    assert lost

# --- What is refused

def test_a_piece_that_ends_its_worker(cluster):
    "Tried again a few times, then named; what a piece raises comes back as it is"
    with on_cluster(cluster.name, cluster.address):
        assert os.getpid() not in send(eval, ['__import__("os").getpid()']*2, 1) # one at a time is no reason to do it here
        with pytest.raises(RuntimeError, match='memory enough'): list(send(os._exit, [3]))
        with pytest.raises(TypeError, match='bad operand'): list(send(abs, [1, 'one']))

def test_other_files_there(models, tmp_path):
    "A worker that finds other numbers at the address measures nothing"
    mood,base = models
    other = tmp_path/'mood.safetensors'
    other.write_bytes(mood.read_bytes())
    sent = [str(other), str(base), 'update', 'flip', None, scan_room._prints(*scan_room._opened(other, base, 'update')), 'scan']
    scan_room._received.cache_clear()
    raw = bytearray(other.read_bytes())
    raw[len(raw)//15*7] ^= 1
    other.write_bytes(raw)
    with pytest.raises(ValueError, match='are other files here'): scan_room._received(*sent)

def test_other_version():
    well,e = do_piece('0.0.0', ('elsewhere', 1), b'')
    assert not well and isinstance(e, ValueError) and f'has spectrum-merging {__version__}, here is 0.0.0' in str(e)

def test_nobody_answers():
    "At once, and in one line, also where what answers is no scheduler"
    began = time.perf_counter()
    with pytest.raises(ConnectionError, match='no dask cluster answers at tcp://127.0.0.1:9 '):
        with on_cluster('dask', 'tcp://127.0.0.1:9'): pass
    assert time.perf_counter()-began<3

def test_what_is_no_cluster(monkeypatch):
    from spectrum_merging import clusters
    monkeypatch.setattr(clusters, '_opening', 2)
    with socket.create_server(('127.0.0.1', 0)) as s, pytest.raises(ConnectionError, match='has said nothing for 2 s'):
        with on_cluster('dask', f'tcp://127.0.0.1:{s.getsockname()[1]}'): pass

@pytest.mark.parametrize('line,said', [('--backend rai', "choose from 'ray', 'dask'"), ('--address x:1', 'no cluster is named'),
    ('--backend dask', 'is found by its address'), ('--backend dask --address nowhere', "address is 'nowhere': pass tcp://HOST:8786")])
def test_typed_wrongly(models, line, said):
    "Before any work, with status 2"
    code = 'import sys; sys.argv[0] = "spectrum-scan"; from spectrum_merging.cli import scan_cli; scan_cli()'
    res = subprocess.run([sys.executable, '-c', code, models[0], *line.split()], capture_output=True, text=True)
    assert res.returncode==2 and said in res.stderr and len(res.stderr.splitlines())==1

def test_in_memory():
    "It is not sent, and the remedy is said"
    with joblib.parallel_config(backend='loky'), pytest.raises(ValueError, match='in the memory of this process .*save it'):
        scan({'w.weight': torch.randn(9, 9)}, progress=False)

# --- Processes of this machine

parent = '''
import sys
sys.path.insert(0, sys.argv[1])
from job import long
from spectrum_merging.lab.training import side_by_side
side_by_side([(n, 9000, long, (sys.argv[1], n)) for n in 'ab'], 2, False, sys.argv[1])
'''

job = '''
import os, time
from pathlib import Path
def long(folder, name, progress):
    (Path(folder)/f'{name}.pid').write_text(str(os.getpid()))
    for _ in range(3000):
        progress(3)
        time.sleep(.1)
'''

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split()[2]!='Z'
    except FileNotFoundError: return False

def until(f, seconds):
    end = time.monotonic()+seconds
    while not f() and time.monotonic()<end: time.sleep(.1)
    return f()

def test_training_ends_with_its_parent(tmp_path):
    "Workers say how far they are, and end when the process that asked is killed"
    (tmp_path/'job.py').write_text(job)
    p = subprocess.Popen([sys.executable, '-c', parent, tmp_path])
    try:
        assert until(lambda: len([o for o in tmp_path.glob('progress/*/[01]') if int(o.read_text() or 0)>0])==2, 120)
        pids = [int((tmp_path/f'{n}.pid').read_text()) for n in 'ab']
        assert all(map(alive, pids)) and p.pid not in pids
    finally: p.kill()
    p.wait()
    assert until(lambda: not any(map(alive, pids)), 10)

def test_training_elsewhere_ends_too(tmp_path, monkeypatch):
    "Where a worker is no child, it ends when nobody has said for long that they wait, or has cleaned up"
    from spectrum_merging.lab import training
    monkeypatch.setattr(training, '_look', 0.)
    (tmp_path/'parent').write_text('1')
    tell = training._Telling(tmp_path, 0)
    tell(20)
    tell(20)
    assert (tmp_path/'0').read_text()=='40'
    monkeypatch.setattr(training, '_gone', -1.)
    with pytest.raises(RuntimeError, match='not been heard of'): tell(1)
    (tmp_path/'parent').unlink()
    with pytest.raises(RuntimeError, match='has ended'): tell(1)

def test_folder_that_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, '_late', 0)
    with pytest.raises(ValueError, match='stored 1 files in .*every machine needs the same cache folder'):
        pieces.await_files([tmp_path/'there', tmp_path], tmp_path)
