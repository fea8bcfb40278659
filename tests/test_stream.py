"Merges into folders: exact for every shape, type, block and worker; atomic, resumable, verifiable."
import contextlib, hashlib, json, os, random, shutil, signal, struct, subprocess, sys, threading, time
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spectrum_merging import files, folder, journal, stream
from spectrum_merging.arithmetic import Scratch, is_finite, storage, weighted_sum, widen
from spectrum_merging.checkpoint import Checkpoint
from spectrum_merging.merge import load_task, merge
from spectrum_merging.plan import Plan, make_plan
from spectrum_merging.rules import rules
from spectrum_merging.verify import verify
from tempfile import TemporaryDirectory
from unittest.mock import patch

scripts = Path(sys.executable).parent
floats = dict(float64=torch.float64, float32=torch.float32, float16=torch.float16,
    bfloat16=torch.bfloat16)

def raw(t): return t.contiguous().view(torch.uint8).numpy().view(storage[str(t.dtype)[6:]])
def bits(t): return t.dtype,tuple(t.shape),t.contiguous().flatten().view(torch.uint8).numpy().tobytes()

def wide_of(*dtypes):
    "Sums are in fp64 where anything is fp64 or an integer, else in fp32"
    return torch.float32 if set(dtypes) <= {torch.float32,torch.float16,torch.bfloat16} else torch.float64

def reference(ts, coefs, dtype):
    "The sum, in plain torch"
    acc = ts[0].to(w := wide_of(*(t.dtype for t in ts), dtype))*coefs[0]
    for t,c in zip(ts[1:], coefs[1:]): acc = acc + t.to(w)*c
    return acc.to(dtype)

# --- arithmetic

@pytest.mark.parametrize('dtype', ['float16','bfloat16'])
def test_every_number_there_is(dtype):
    "All 65,536 of a type: which are finite, what they are in fp32 and fp64, and back"
    t = torch.arange(1<<16, dtype=torch.int32).to(torch.int16).view(floats[dtype])
    assert [is_finite(raw(o), dtype) for o in t.split(1)] == t.isfinite().tolist()
    t = t[t.isfinite()]
    assert np.array_equal(widen(raw(t), dtype), t.double().numpy())
    for to in floats:
        out,ok = weighted_sum([raw(t)], [dtype], [1.], to, Scratch(1<<16))
        assert ok==bool(t.to(floats[to]).isfinite().all())
        if ok: assert out.tobytes()==raw(t.to(floats[to])).tobytes()

@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(list(floats)), min_size=1, max_size=4), st.sampled_from(list(floats)),
    st.integers(1, 3000), st.integers(-45, 38), st.integers(0, 10**6), st.booleans())
def test_weighted_sum(dtypes, to, n, size, seed, halves):
    "As torch does it, bit for bit, subnormals and ties among them; what does not fit is reported"
    g = torch.Generator().manual_seed(seed)
    def numbers(d): return (torch.randn(n, generator=g, dtype=torch.float64)*10.**size).to(floats[d])
    ts = [numbers(d) for d in dtypes]
    if not all(t.isfinite().all() for t in ts): return
    coefs = [1/len(ts)]*len(ts) if halves else torch.randn(len(ts), generator=g).double().tolist()
    want = reference(ts, coefs, floats[to])
    out,ok = weighted_sum([raw(t) for t in ts], dtypes, coefs, to, Scratch(1+seed % 3000))
    assert ok==bool(want.isfinite().all())
    if ok: assert out.tobytes()==raw(want).tobytes()

@pytest.mark.parametrize('to', floats)
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('dtype', floats)
def test_not_finite(dtype, bad, to):
    "A single one, wherever it is and whatever bits a NaN has"
    t = torch.ones(100, dtype=floats[dtype])
    t[73] = bad
    for c in ([.5, .5], [0.3, .7]):
        assert not weighted_sum([raw(t), raw(torch.ones_like(t))], [dtype]*2, c, to, Scratch(100))[1]
    odd = torch.full((4,), -1, dtype=torch.int64).view(floats[dtype])
    assert odd.isnan().all()
    assert not weighted_sum([raw(odd)]*2, [dtype]*2, [.5, .5], to, Scratch(16))[1]

# --- files against memory

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
def model(shapes, dtypes, seed):
    g = torch.Generator().manual_seed(seed)
    sd = {f'l{i}.weight': torch.randn(s, generator=g).to(d) for i,(s,d) in enumerate(zip(shapes, dtypes))}
    return sd | {'ids': torch.arange(5), 'mask': torch.tensor([True,False]), 'step': torch.tensor(seed)}

@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data(), st.lists(shapes, min_size=1, max_size=6), st.sampled_from([k for k,o in rules.items() if o.kind=='layer' and not o.adds]),
    st.integers(2, 4), st.integers(1, 4), st.integers(1, 4000), st.integers(1, 300), st.integers(1, 40))
def test_files_equal_reference(data, shapes, strategy, n, workers, shard, block, piece):
    "Any shapes, types, shard size, block, piece and number of workers"
    if rules[strategy].two_only: n = 2
    dtypes = data.draw(st.lists(st.sampled_from(list(floats.values())), min_size=len(shapes),
        max_size=len(shapes)))
    ms,base = {f'm{i}': model(shapes, dtypes, i) for i in range(n)},model(shapes, dtypes, 99)
    for m in [*ms.values(), base]: m['step'] = torch.tensor(3)
    snrs = data.draw(st.lists(st.floats(0, 5), min_size=n*len(shapes), max_size=n*len(shapes)))
    scans = {}
    for i,m in enumerate(ms):
        names = [f'l{j}.weight' for j in range(len(shapes))]
        scans[m] = pd.DataFrame(dict(name=names, snr=snrs[i*len(shapes):(i+1)*len(shapes)], estimator='flip',
            of='weights'))
    how = dict(of='weights', scans=scans, threshold=2.) if rules[strategy].asks('snr') else {}
    plan = make_plan(strategy, ms, base, heads=[], **how)
    with TemporaryDirectory() as d, patch.object(stream, 'BLOCK', block), patch.object(stream, 'PIECE', piece):
        d = Path(d)
        for k,m in dict(ms, base=base).items(): save_file(m, d/f'{k}.safetensors')
        out = merge(plan, {k: d/f'{k}.safetensors' for k in ms}, d/'base.safetensors', d/'out',
            n_workers=workers, shard_size=shard)
        got = load_task(out)
        body = Checkpoint(out)
        assert all(o.offset % min(64, np.dtype(storage[o.info.dtype]).itemsize)==0
            for o in body._entries.values())
        for f in body.files:
            assert f.stat().st_size <= shard+5000 or len(Checkpoint(f))==1
    for row in plan.table.to_dict('records'):
        c = {k: v for k,v in plan.coefs(row).items() if v}
        ts = [dict(ms, base=base)[k][row['name']] for k in c]
        want = ts[0] if list(c.values())==[1] else reference(ts, list(c.values()), ts[0].dtype)
        assert bits(got[row['name']])==bits(want), row
    assert set(got)==set(base)

@pytest.mark.parametrize('to', floats)
def test_dtype(to, tmp_path):
    "The result in a type that the user names; integers keep theirs"
    ms = [model([(7, 5), (3,)], [torch.float32, torch.bfloat16], i) for i in (3, 3)]
    got = load_task(merge(make_plan('standard', ms, heads=[]), ms, out=tmp_path/'out', dtype=to))
    for k,v in ms[0].items(): assert bits(got[k])==bits(v.to(floats[to]) if v.is_floating_point() else v)
    with pytest.raises(ValueError, match="'int8': choose 'float64'"):
        merge(make_plan('standard', ms), ms, dtype='int8')

def write_models(d, n=3, rows=400, shards=2, dtype=torch.bfloat16):
    "Folders of sharded checkpoints"
    for i,name in enumerate(['base','a','b']):
        g = torch.Generator().manual_seed(i)
        sd = {f'model.layers.{j}.mlp.weight': torch.randn(rows, 300, generator=g).to(dtype) for j in range(n)}
        sd |= {'head.weight': torch.randn(3, 300, generator=g).to(dtype), 'norm.bias': torch.randn(300)}
        (d/name).mkdir(parents=True)
        keys = list(sd)
        where = {k: f'model-{i % shards+1:05}-of-{shards:05}.safetensors' for i,k in enumerate(keys)}
        for f in set(where.values()): save_file({k: sd[k] for k in keys if where[k]==f}, d/name/f)
        (d/name/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=where)))
        (d/name/'config.json').write_text(json.dumps(dict(name=name)))
    return {k: d/k for k in 'ab'},d/'base'

def all_bytes(d): return {o.relative_to(d).as_posix(): o.read_bytes() for o in d.rglob('*') if o.is_file()}

def test_same_bytes_whoever_does_it(tmp_path):
    "Workers, blocks read in another order, and Python's hash seed change no byte"
    models,base = write_models(tmp_path)
    seen = {}
    for i,(workers,seed) in enumerate([(1, 0), (2, 1), (5, 2)]):
        subprocess.run([scripts/'spectrum-merge', f"a={models['a']}", f"b={models['b']}", '--base', base,
            '--strategy', 'snr_weighted', '--top', '70', '--out', tmp_path/str(i), '--workers', str(workers)],
            check=True, capture_output=True, env=os.environ | dict(PYTHONHASHSEED=str(seed)))
        seen[workers] = all_bytes(tmp_path/str(i))
    assert seen[1]==seen[2]==seen[5]

# --- killed, interrupted, disturbed

slow = '''
import sys, time
from spectrum_merging import folder, stream
from spectrum_merging.merge import merge
from spectrum_merging.plan import make_plan
stream.PIECE, folder.FLUSH = 1<<12, 1<<16
real = stream._run_piece
def slow(*a):
    time.sleep(.01)
    return real(*a)
stream._run_piece = slow
d,out = sys.argv[1:]
models,base = {k: f'{d}/{k}' for k in 'ab'},f'{d}/base'
merge(make_plan('base_reset', models, base, threshold=0, of='weights'), models, base, out, n_workers=2)
'''

def test_kill_and_continue(tmp_path):
    "kill -9 at 20 random moments: never a complete-looking folder; in the end the same bytes"
    write_models(tmp_path/'in', n=6)
    def start(out): return subprocess.Popen([sys.executable, '-c', slow, tmp_path/'in', out])
    begun = time.time()
    assert start(tmp_path/'whole').wait()==0
    took,whole,rng = time.time()-begun,all_bytes(tmp_path/'whole'),random.Random(0)
    kills,resumed,i,out,journal = 0,0,0,tmp_path/'out0',tmp_path/'.out0.partial/journal'
    while kills<20:
        p = start(out)
        time.sleep(rng.uniform(.3, 1)*took)
        p.send_signal(signal.SIGKILL)
        kills += p.wait()==-9
        resumed += journal.exists() and journal.read_text().count('\n')>1
        if not out.exists(): continue
        assert all_bytes(out)==whole
        i += 1
        out,journal = tmp_path/f'out{i}',tmp_path/f'.out{i}.partial/journal'
    assert start(out).wait()==0 and all_bytes(out)==whole
    assert resumed>=5
    assert not journal.exists()

def test_no_orphans(tmp_path):
    "Children end when their parent is killed"
    write_models(tmp_path/'in', n=6)
    p = subprocess.Popen([sys.executable, '-c', slow, tmp_path/'in', tmp_path/'out'])
    listed = Path(f'/proc/{p.pid}/task/{p.pid}/children')
    while p.poll() is None and not (children := listed.read_text().split()): time.sleep(.01)
    p.kill()
    p.wait()
    end = time.time()+10
    def alive(pid):
        try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]!='Z'
        except OSError: return False
    while any(map(alive, children)) and time.time()<end: time.sleep(.02)
    assert not any(map(alive, children)) and not (tmp_path/'out').exists()

@pytest.fixture
def halfway(tmp_path):
    "A merge that was interrupted before its last step, and how to continue it"
    models,base = write_models(tmp_path/'in')
    plan = make_plan('standard', models)
    def go(**kw): return merge(plan, models, out=tmp_path/'out', **kw)
    def stop(self): raise KeyboardInterrupt
    with patch.object(folder.Partial, 'finish', stop), pytest.raises(KeyboardInterrupt): go()
    return go,tmp_path,models

def test_continues_without_reading_again(halfway):
    go,d,_ = halfway
    with patch.object(stream, '_run_piece', lambda *a: pytest.fail('did it again')): go()
    assert verify(d/'out', all=True).ok.all() and not (d/'.out.partial').exists()

def test_other_settings_do_not_continue(halfway):
    "An unfinished merge of something else is neither continued nor deleted"
    go,d,models = halfway
    before = all_bytes(d)
    with pytest.raises(FileExistsError, match='unfinished merge of other inputs or settings.*delete'):
        go(dtype='float32')
    os.utime(models['a']/'model-00001-of-00002.safetensors', ns=(1, 1))
    with pytest.raises(FileExistsError, match='other inputs'): go()
    assert all_bytes(d)==before

@pytest.mark.parametrize('damage', ['torn', 'empty', 'no journal', 'short file'])
def test_damaged_journal(halfway, damage):
    "A torn last line is a piece not done; without a journal all starts again; of a cut file, what is lost"
    go,d,_ = halfway
    journal,file = d/'.out.partial/journal',d/'.out.partial/data/model.safetensors'
    lines = journal.read_text().splitlines(True)
    if damage=='torn': # and what is written next must not join it to a number of another task
        journal.write_text(''.join(lines[:-1])+'1')
        def stop(self): raise KeyboardInterrupt
        with patch.object(folder.Partial, 'finish', stop), pytest.raises(KeyboardInterrupt): go()
        assert journal.read_text().splitlines()==[o.strip() for o in lines]
    if damage=='empty': journal.write_text('')
    if damage=='no journal': journal.unlink()
    if damage=='short file': os.truncate(file, 100)
    with pytest.warns(UserWarning, match='made again') if damage=='short file' else contextlib.nullcontext(): go()
    assert verify(d/'out', all=True).ok.all()

def test_two_at_once(halfway):
    "The second of two processes that write one folder is told so"
    import fcntl
    go,d,_ = halfway
    with open(d/'.out.partial/journal') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match='another process'): go()
    go()

def test_foreign_folder_in_the_way(tmp_path):
    models,_ = write_models(tmp_path/'in')
    (tmp_path/'.out.partial').mkdir()
    (tmp_path/'.out.partial/mine.txt').touch()
    with pytest.raises(FileExistsError, match='in the way'):
        merge(make_plan('standard', models), models, out=tmp_path/'out')
    assert (tmp_path/'.out.partial/mine.txt').exists()

def test_empty_folder_is_used(tmp_path):
    models,_ = write_models(tmp_path/'in')
    (tmp_path/'out').mkdir()
    assert (merge(make_plan('standard', models), models, out=tmp_path/'out')/'merge.json').exists()

@pytest.mark.parametrize('when', ['hashed, not merged', 'merged'])
def test_input_changes_meanwhile(when, tmp_path):
    models,_ = write_models(tmp_path/'in')
    run,hash_inputs,hashed = folder.run_pieces,folder.hash_inputs,threading.Event()
    def change(): spoil(models['b']/'model-00001-of-00002.safetensors', 4000, b'other')
    def hashing(*a):
        try: return hash_inputs(*a)
        finally: hashed.set()
    def meddle(*a, begun, **kw):
        def first():
            begun()
            assert hashed.wait(60)
            change()
        run(*a, begun=first if when!='merged' else begun, **kw)
        if when=='merged': change()
    with patch.object(folder, 'run_pieces', meddle), patch.object(folder, 'hash_inputs', hashing), \
            pytest.raises(ValueError, match='changed while'):
        merge(make_plan('standard', models), models, out=tmp_path/'out')
    assert [o.name for o in tmp_path.iterdir()]==['in']

def test_hashed_while_merged(tmp_path):
    "The hashes of new inputs are begun before a number is read; a merge that fails waits for none, and leaves no thread behind"
    models,_ = write_models(tmp_path/'in')
    plan,begun,given_up,before = make_plan('standard', models),threading.Event(),[],threading.active_count()
    def endless(files, n_workers, ended):
        begun.set()
        given_up.append(ended.wait(60))
        raise OSError('never seen')
    def fail(*a):
        assert begun.wait(60)
        raise ValueError('no number')
    with patch.object(folder, 'known_sha256', endless), patch.object(stream, '_run_piece', fail), pytest.raises(ValueError, match='no number'):
        merge(plan, models, out=tmp_path/'out')
    assert given_up==[True] and threading.active_count()==before and [o.name for o in tmp_path.iterdir()]==['in']
    told = json.loads((merge(plan, models, out=tmp_path/'out')/'merge.json').read_text())['inputs']
    assert all(h==hashlib.sha256((models[m]/k).read_bytes()).hexdigest() for m in 'ab' for k,h in told[m]['sha256'].items())
    assert [len(told[m]['sha256']) for m in 'ab']==[2, 2]

# --- bad input, as a user meets it

def spoil(f, at, data):
    with open(f, 'r+b') as o:
        o.seek(at)
        o.write(data)

class Evil:
    def __reduce__(self): return os.system, ('touch evil',)

def cut(d): os.truncate(d/'a/model-00001-of-00002.safetensors', 5000)
def header(d): spoil(d/'a/model-00001-of-00002.safetensors', 0, struct.pack('<Q', 1<<40))
def lost(d): (d/'a/model-00002-of-00002.safetensors').unlink()
def absent(d):
    f = d/'a/model.safetensors.index.json'
    where = json.loads(f.read_text())['weight_map']
    f.write_text(json.dumps(dict(weight_map=where | {'nowhere.weight': 'model-00001-of-00002.safetensors'})))
def evil(d):
    shutil.rmtree(d/'a')
    (d/'a').mkdir()
    torch.save(dict(w=torch.ones(2), x=Evil()), d/'a/pytorch_model.bin')
def full(d): pass
def taken(d):
    (d.parent/'out').mkdir()
    (d.parent/'out/mine').touch()

@pytest.mark.parametrize('spoiled,words', [(cut, ['model-00001', 'download']), (header, ['header', '1,099,511']),
    (lost, ['missing shards: model-00002']), (absent, ['nowhere.weight']), (evil, ['run code', 'save_file']),
    (full, ['File too large']), (taken, ['out', 'new folder'])], ids=lambda o: getattr(o, '__name__', ''))
def test_errors(spoiled, words, tmp_path):
    "One message, status not 0, nothing left behind, inputs untouched, no code run"
    models,base = write_models(tmp_path/'in', rows=4000)
    spoiled(tmp_path/'in')
    before = all_bytes(tmp_path)
    import resource
    def limit():
        if spoiled is full: resource.setrlimit(resource.RLIMIT_FSIZE, (1<<20, 1<<20))
    p = subprocess.run([scripts/'spectrum-merge', models['a'], models['b'], '--out', tmp_path/'out'],
        capture_output=True, text=True, cwd=tmp_path, preexec_fn=limit)
    assert p.returncode and 'Traceback' not in p.stderr, p.stderr
    assert [o for o in words if o not in p.stderr] == [], p.stderr
    assert all_bytes(tmp_path)==before and not list(tmp_path.glob('.*'))

@pytest.mark.parametrize('out', ['/proc/spectrum/out', '/dev/null/out'])
def test_place_that_cannot_be_written(out, tmp_path):
    models,_ = write_models(tmp_path/'in')
    with pytest.raises(OSError): merge(make_plan('standard', models), models, out=out)

def test_read_only_folder(tmp_path):
    models,_ = write_models(tmp_path/'in')
    (tmp_path/'ro').mkdir(mode=0o555)
    if os.access(tmp_path/'ro', os.W_OK): pytest.skip('root writes everywhere')
    with pytest.raises(PermissionError): merge(make_plan('standard', models), models, out=tmp_path/'ro/out')

def test_full_disk(tmp_path):
    "A file system of 1 MB"
    models,_ = write_models(tmp_path/'in', rows=4000)
    (tmp_path/'small').mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', tmp_path/'small'],
            capture_output=True).returncode: pytest.skip('cannot mount')
    try:
        plan = make_plan('standard', models)
        with pytest.raises(OSError, match='GB are free'): merge(plan, models, out=tmp_path/'small/out')
        with patch.object(folder, 'out_problems', lambda *a: []), pytest.raises(OSError, match='No space'):
            merge(plan, models, out=tmp_path/'small/out')
        assert not list((tmp_path/'small').iterdir())
    finally: subprocess.run(['umount', tmp_path/'small'], check=True)

def run_python(code, *args):
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True)

forked = '''
import os, sys
from spectrum_merging import stream
from spectrum_merging.merge import merge
from spectrum_merging.plan import make_plan
assert stream.can_fork()
def run(task, *a): EFFECT
stream._run_piece = run
models = {k: f'{sys.argv[1]}/{k}' for k in 'ab'}
try: merge(make_plan('standard', models), models, out=sys.argv[2], n_workers=2)
except Exception as e: print(type(e).__name__, e)
'''

@pytest.mark.parametrize('effect,words', [('os._exit(9)', 'ChildProcessError a worker process was killed'),
    ('raise OSError(28, "No space left")', 'OSError [Errno 28] No space left'),
    ('raise ValueError("x"*100_000)', 'ValueError xxx')], ids=['killed', 'full', 'long'])
def test_forked_worker_fails(effect, words, tmp_path):
    "What goes wrong in a child process is an error here, and nothing is left behind"
    write_models(tmp_path/'in')
    p = run_python(forked.replace('EFFECT', effect), tmp_path/'in', tmp_path/'out')
    assert p.stdout.startswith(words), p.stdout+p.stderr
    assert [o.name for o in tmp_path.iterdir()]==['in']

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_direct_writes(dtype, tmp_path):
    "Large files go past the system's cache, also where tensors begin and end within a page; same bytes"
    for k in 'ab':
        g = torch.Generator().manual_seed(ord(k))
        save_file({f'l{i}.weight': torch.randn(n, 7, generator=g).to(dtype)
            for i,n in enumerate((100_003, 5, 60_000, 1, 77_777))}, tmp_path/f'{k}.safetensors')
    models = {k: tmp_path/f'{k}.safetensors' for k in 'ab'}
    plan = make_plan('standard', models)
    plain = merge(plan, models, out=tmp_path/'plain')
    with patch.object(journal, 'DIRECT', 0): direct = merge(plan, models, out=tmp_path/'direct')
    def refuse(*a): return False
    with patch.object(journal, 'DIRECT', 0), patch.object(journal._Direct, 'write', refuse):
        refused = merge(plan, models, out=tmp_path/'refused')
    assert all_bytes(plain)==all_bytes(direct)==all_bytes(refused)

@pytest.mark.parametrize('direct', [0, 1<<40])
def test_few_large_writes(direct, tmp_path):
    "A disk that takes some hundred requests a second gets megabytes by each"
    models = {}
    for k in 'ab':
        save_file(dict(w=torch.randn(3_000_000, generator=torch.Generator().manual_seed(ord(k)))), tmp_path/f'{k}.safetensors')
        models[k] = tmp_path/f'{k}.safetensors'
    plan,sizes,real = make_plan('standard', models),[],os.pwrite
    def pwrite(fd, buf, at):
        sizes.append(memoryview(buf).nbytes)
        return real(fd, buf, at)
    with patch.object(journal, 'DIRECT', direct), patch('os.pwrite', pwrite): merge(plan, models, out=tmp_path/'out')
    assert sum(n>4096 for n in sizes)==3 and max(sizes)==stream.WRITE and len(sizes)<8
    mean = load_file(tmp_path/'out/model.safetensors')['w']
    assert mean.equal(.5*load_file(models['a'])['w'] + .5*load_file(models['b'])['w'])

# --- hashes

def test_remembered_hashes(tmp_path, monkeypatch):
    "A large file is read once, and again when it changed; a broken memory is no obstacle"
    monkeypatch.setenv('SPECTRUM_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(files, 'LARGE', 10)
    later = [10**10]
    monkeypatch.setattr(files.time, 'time_ns', lambda: int(time.time()*1e9)+later[0])
    f,old,read = tmp_path/'f',time.time_ns()-10**10,[]
    def write(text):
        f.write_text(text)
        os.utime(f, ns=(old, old+len(text)))
    real = files.sha256
    monkeypatch.setattr(files, 'sha256', lambda p, *a: (read.append(p), real(p, *a))[1])
    def sha(): return files.known_sha256([f])[f]
    write('a'*20)
    assert sha()==sha()==hashlib.sha256(b'a'*20).hexdigest() and len(read)==1
    write('b'*21)
    assert sha()==hashlib.sha256(b'b'*21).hexdigest() and len(read)==2
    for text in ('', '[]', '{"x": 3}', json.dumps({str(f): 3}), 'x'):
        (tmp_path/'cache/sha256.json').write_text(text)
        assert sha()==hashlib.sha256(b'b'*21).hexdigest()
    os.utime(f, ns=(old, old+20)) # changed in place, and its time set back
    f.write_text('c'*21)
    os.utime(f, ns=(old, old+21))
    assert sha()==hashlib.sha256(b'c'*21).hexdigest()
    later[0] = 0
    os.utime(f) # just changed: it may change again within the clock's grain
    n = len(read)
    assert sha()==sha() and len(read)==n+2

def test_a_name_is_no_hash(tmp_path):
    "In the hub's cache a file is a link to one named by its SHA-256: that is compared, and never taken for it"
    blob = tmp_path/('ab'*32)
    blob.write_text('not read')
    (tmp_path/'model.safetensors').symlink_to(blob)
    assert files.sha256(tmp_path/'model.safetensors')==hashlib.sha256(b'not read').hexdigest()
    with pytest.raises(ValueError, match=f'is damaged.*delete {blob}'): files.known_sha256([tmp_path/'model.safetensors'])

def test_hub_revision(tmp_path, monkeypatch):
    "A hub id is written down with its revision, and opened again at that one"
    models,_ = write_models(tmp_path/'in')
    asked = []
    def fetch(name, allow_patterns, revision='main'):
        asked.append(revision)
        snap = tmp_path/f'hub/{name}/snapshots'/('ab'*20)
        if not snap.exists(): shutil.copytree(models[name[-1]], snap)
        return str(snap)
    monkeypatch.setattr('huggingface_hub.snapshot_download', fetch)
    hub = dict(a='org/a', b='org/b')
    out = merge(make_plan('standard', hub), hub, out=tmp_path/'out')
    told = json.loads((out/'merge.json').read_text())['inputs']
    assert told['a']['source']=='org/a@'+'ab'*20
    assert 'org/a' in (out/'README.md').read_text() and set(asked)=={'main'}
    n = len(asked)
    with pytest.raises(FileNotFoundError, match='a is not at .*hub id'): verify(out) # the hub is asked where the user says so
    assert len(asked)==n and verify(out, {k: told[k]['source'] for k in 'ab'}).ok.all() and asked[-1]=='ab'*20

# --- what a folder says of itself

def test_manifest_and_card(tmp_path):
    models,base = write_models(tmp_path/'in')
    out = merge(make_plan('base_reset', models, base, threshold=1e9, of='weights'), models, base,
        tmp_path/'out', files_from='b', results='| task | accuracy |\n|---|---|\n| x | .9 |')
    m = json.loads((out/'merge.json').read_text())
    want = {o.name: hashlib.sha256(o.read_bytes()).hexdigest()
        for o in models['a'].glob('*.safetensors')}
    assert m['inputs']['a']['sha256']==want and set(m['inputs'])=={'a','b','base'}
    with safe_open(out/'model.safetensors', 'pt') as f: meta = f.metadata()
    assert json.loads(meta['inputs_sha256'])['a']==want and meta['format']=='pt'
    assert json.loads(meta['plan'])['estimator']=='flip' and meta['plan_digest']==m['plan_digest']
    assert json.loads((out/'config.json').read_text())==dict(name='b')
    card = (out/'README.md').read_text()
    assert all(o in card for o in ['base_reset', m['plan_digest'], '| x | .9 |', '| all base |', '`b`'])
    with pytest.raises(ValueError, match="files_from is 'c': choose one of a, b"):
        merge(make_plan('standard', models), models, out=tmp_path/'o2', files_from='c')

@pytest.mark.parametrize('where', ['model.safetensors', 'heads/a.safetensors', 'plan.csv', 'config.json',
    'merge.json', 'in/a/model-00001-of-00002.safetensors', 'in/b/model-00002-of-00002.safetensors'])
def test_one_flipped_bit(where, tmp_path):
    "Anywhere: header, first and last number, middle; also without making anything again"
    models,_ = write_models(tmp_path/'in')
    out = merge(make_plan('standard', models), models, out=tmp_path/'out')
    assert verify(out).ok.all() and verify(out, all=True).ok.all()
    file = tmp_path/where if where.startswith('in/') else out/where
    whole = file.read_bytes()
    rng = random.Random(where)
    for at in {0, 8, len(whole)//2, len(whole)-1, *(rng.randrange(len(whole)) for _ in range(6))}:
        data = bytearray(whole)
        data[at] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        for kw in (dict(sample=0), dict(all=True)):
            try: assert not verify(out, **kw).ok.all(), at
            except ValueError: pass
    file.write_bytes(whole)
    assert verify(out, all=True).ok.all()

def test_verify_command(tmp_path):
    models,_ = write_models(tmp_path/'in')
    out = merge(make_plan('standard', models), models, out=tmp_path/'out')
    def run(*a): return subprocess.run([scripts/'spectrum-verify', *a], capture_output=True, text=True)
    good = run(out, '--all')
    assert good.returncode==0 and 'norm.bias average of a, b' in good.stdout
    assert '6 of 6 tensors made again' in good.stdout
    shutil.move(models['a'], tmp_path/'moved')
    gone = run(out)
    assert gone.returncode and 'a is not at' in gone.stderr
    assert run(out, f"a={tmp_path/'moved'}").returncode==0
    spoil(out/'model.safetensors', 5000, b'\x12\x34')
    bad = run(out, f"a={tmp_path/'moved'}")
    assert bad.returncode and 'checks failed' in bad.stderr and 'Traceback' not in bad.stderr
    assert 'no merge.json' in run(tmp_path).stderr

frozen = Path(__file__).parent/'frozen'/'folder_0_1_0' # written by 0.1.0 before its rooms were moved

@pytest.mark.parametrize('kind', ['ties', 'snr_winner'])
def test_folders_stay_verifiable(kind, tmp_path):
    "What was written once verifies for good, and the same plan still makes the same bytes"
    models,base = {m: frozen/f'{m}.safetensors' for m in ('cat','dog')},frozen/'base.safetensors'
    told = json.loads((frozen/kind/'merge.json').read_text())
    found = verify(frozen/kind, models, base if 'base' in told['inputs'] else None, all=True)
    assert found.ok.all() and set(found.check)=={'sha256','digest','shared tensors','header','made again'}
    again = merge(Plan.load(frozen/kind/'plan.csv'), models, base, tmp_path/kind, dtype=told['dtype'])
    for o in [*again.rglob('*.safetensors'), again/'plan.csv']:
        assert o.read_bytes()==(frozen/kind/o.relative_to(again)).read_bytes()

def test_small_memory(tmp_path):
    "Peak memory of the command is small and does not grow with the model"
    peak = {}
    for n in (3, 24):
        models,_ = write_models(tmp_path/f'in{n}', n=n, rows=10_000)
        code = '''import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)'''
        peak[n] = int(subprocess.run([sys.executable, '-c', code, scripts/'spectrum-merge', models['a'],
            models['b'], '--out', tmp_path/f'out{n}'], check=True, capture_output=True, text=True).stdout)
        shutil.rmtree(tmp_path/f'in{n}')
    assert peak[24] < 350_000 and abs(peak[24]/peak[3]-1) < .1, peak

def test_scan_in_small_memory(tmp_path):
    "A matrix of 256 MB in a file is measured in pieces"
    g = torch.Generator().manual_seed(0)
    big = torch.randn(160_000, 400, generator=g)
    save_file(dict(w=big), tmp_path/'big.safetensors')
    del big
    code = f'''from spectrum_merging.scan import scan
t = scan({str(tmp_path/'big.safetensors')!r}, progress=False)
print(t.snr[0], t.n_spikes[0], *open('/proc/self/status').read().partition('VmHWM:')[2].split()[:1])'''
    snr,spikes,peak = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True,
        text=True).stdout.split()
    assert float(snr) < .01 and int(peak) < 350_000
