"Merges in processes of their own, in each of which one call of the system goes wrong; `test_faults` runs it"
import builtins, errno, fcntl, hashlib, io, json, os, re, shutil, signal, sys, warnings
from pathlib import Path
from spectrum_merging import folder, journal, stream
from spectrum_merging.merge import merge
from spectrum_merging.plan import Plan

stream.PIECE = folder.PIECE = 1<<12
folder.FLUSH = 1<<15
home,wanted = Path(sys.argv[1]),json.loads(sys.argv[2])
models = {k: home/'in'/k for k in 'ab'}
plan = Plan.load(home/'p.csv')

calls = {**{k: (os, k) for k in ('mkdir','open','posix_fallocate','pwrite','write','fdatasync','fsync','ftruncate','replace','rename',
    'unlink','rmdir','pipe','fork','pread','preadv','lseek','listdir')}, 'flock': (fcntl, 'flock'), 'fopen': (io, 'open'),
    'fopen2': (builtins, 'open'), 'copyfile': (shutil, 'copyfile')}

def files(d): return {o.relative_to(d).as_posix(): hashlib.sha256(o.read_bytes()).hexdigest() for o in sorted(d.rglob('*')) if o.is_file()}

def is_write(call, a, k):
    "Whether a call of `open` writes; all others count anyway"
    if call=='open': return bool(a[1] & (os.O_WRONLY | os.O_RDWR)) or os.path.isdir(a[0])
    if call in ('fopen','fopen2'): return any(o in str(k.get('mode', a[1] if len(a)>1 else 'r')) for o in 'wxa+')
    return True

def spoil(call, nth, effect):
    "Let the `nth` call go wrong; counts all"
    where,name = calls[call]
    real,count = getattr(where, name),[0]
    def fault(*a, **k):
        count[0] += is_write(call, a, k)
        if count[0]!=nth or not is_write(call, a, k): return real(*a, **k)
        if effect=='kill': os.kill(os.getpid(), signal.SIGKILL)
        if effect=='after': # killed when it is done
            real(*a, **k)
            os.kill(os.getpid(), signal.SIGKILL)
        if effect=='short': return real(a[0], bytes(a[1])[:max(1, len(a[1])//2)], *a[2:])
        if effect=='torn': real(a[0], bytes(a[1])[:len(a[1])//2], *a[2:])
        code = getattr(errno, 'ENOSPC' if effect=='torn' else effect)
        raise OSError(code, os.strerror(code), *(str(o) for o in a[:1] if isinstance(o, (str, Path))))
    setattr(where, name, fault)
    return count

def run(out, workers=2, call=None, nth=0, effect=None):
    "What becomes of a merge: `[kind of error, message, calls]`, or the number of a signal"
    r,w = os.pipe()
    if not (pid := os.fork()):
        os.close(r)
        say,tell = [None, ''],os.write
        warnings.simplefilter('ignore')
        count = spoil(call, nth, effect) if call else [0]
        try: merge(plan, models, out=out, n_workers=workers)
        except BaseException as e: say = [type(e).__name__, str(e)]
        tell(w, json.dumps(say+count).encode())
        os._exit(0)
    os.close(w)
    with os.fdopen(r) as f: said = f.read()
    _,status = os.waitpid(pid, 0)
    return json.loads(said) if said and os.WIFEXITED(status) else -os.WTERMSIG(status) if os.WIFSIGNALED(status) else 'silent'

def half(out):
    "A merge that was killed half-way"
    assert run(out, 1, 'fdatasync', 4, 'kill')==-9 and journal.partial_place(out).exists()

def verdict(out, before, call, nth, effect, resumed, workers):
    "None where all is well, else what is not"
    if resumed: half(out)
    said = run(out, workers, call, nth, effect)
    if said=='silent': return 'ended without a word'
    if isinstance(said, list) and said[0]:
        if said[0] not in ('OSError','FileExistsError','PermissionError','ChildProcessError','BlockingIOError','InterruptedError',
            'NotADirectoryError'): return f'{said[:2]}'
        if str(home) not in said[1] and said[0]!='ChildProcessError' and 'workers' not in said[1]: return f'names no place: {said[1]}'
        if not re.search(r'free |repeat|choose|ask for|move |pass |the same command|try again', said[1]): return f'no remedy: {said[1]}'
    if out.exists() and files(out)!=wants: return f'a wrong folder after {said}'
    if isinstance(said, list) and not said[0] and not out.exists(): return 'no error and no folder'
    again = run(out, workers)
    if out.exists() and again[0] not in (None, 'FileExistsError'): return f'the second time: {again}'
    if not out.exists() or files(out)!=wants: return f'a wrong folder the second time: {again} after {said}'
    if files(home/'in')!=before: return 'inputs changed'
    left = sorted({o.name for o in home.iterdir()}-{'in','p.csv','ref',out.name,'.cache'})
    return f'left behind: {left} after {said}, {again}' if left else None

def number(call, resumed, workers):
    "How often a merge makes a call"
    out = home/'count'
    if resumed: half(out)
    n = run(out, workers, call)[2]
    shutil.rmtree(out)
    return n

before = files(home/'in')
run(home/'ref')
wants = files(home/'ref')
for call,effects,resumed,workers,every in wanted:
    n = number(call, resumed, workers)
    places = list(range(1, n+1)) if every else sorted({1, (n+1)//2, n} & {*range(1, n+1)})
    # in short: being killed at each place, each error at one of them
    cases = [(nth, o) for i,o in enumerate(effects) for nth in (places if every or o=='kill' else places[i % 3:][:1] or places[:1])]
    for nth,effect in cases:
        out = home/'out'
        bad = verdict(out, before, call, nth, effect, resumed, workers)
        print(json.dumps([call, nth, n, effect, bad]), flush=True)
        for o in (out, journal.partial_place(out)): shutil.rmtree(o, ignore_errors=True)
    if not n: print(json.dumps([call, 0, 0, '', None]), flush=True)
