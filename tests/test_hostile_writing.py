"What others may have put where a result is written, and into a result that is verified."
import hashlib, json, os, shutil
import numpy as np, pandas as pd, pytest
from safetensors.numpy import load_file, save_file
from spectrum_merging import folder, journal, stream
from spectrum_merging.checkpoint import Checkpoint
from spectrum_merging.extract import extract
from spectrum_merging.files import atomic, known_sha256
from spectrum_merging.merge import merge
from spectrum_merging.plan import Plan, make_plan
from spectrum_merging.preflight import PreflightError
from spectrum_merging.stream import plan_rows
from spectrum_merging.verify import verify

rng = np.random.default_rng(0)
def net(): return {f'l{i}.weight': rng.standard_normal((40, 500)).astype('f4') for i in range(3)} | {
    'fc.weight': rng.standard_normal((3, 500)).astype('f4')}

@pytest.fixture
def models(tmp_path):
    for k in 'ab':
        (tmp_path/k).mkdir()
        save_file(net(), tmp_path/k/'model.safetensors')
        (tmp_path/k/'config.json').write_text(json.dumps(dict(name='b')))
    return {k: tmp_path/k for k in 'ab'}

def files(d):
    def what(o): return hashlib.sha256(o.read_bytes()).hexdigest() if o.stat().st_size<1<<30 else o.stat().st_size
    return {o.relative_to(d).as_posix(): what(o) for o in sorted(d.rglob('*')) if o.is_file()}

class Killed(BaseException): pass

@pytest.fixture
def half(models, tmp_path, monkeypatch):
    "A merge that was killed when some pieces were noted; `go` runs it again"
    monkeypatch.setattr(stream, 'PIECE', 1<<12)
    monkeypatch.setattr(folder, 'FLUSH', 1<<14)
    monkeypatch.setattr(stream, 'as_completed', list) # in order: the first pieces are noted
    plan = make_plan('standard', models)
    def go(out='out', **kw): return merge(plan, models, out=tmp_path/out, n_workers=1, **kw)
    go('ref')
    real,n = journal.Partial.note,[0]
    def note(self, done):
        real(self, done)
        n[0] += 1
        if n[0]==4: raise Killed
    with monkeypatch.context() as m:
        m.setattr(journal.Partial, 'note', note)
        m.setattr(folder, '_leave', lambda part, e: (part.close(), exec('raise e', dict(e=e))))
        with pytest.raises(Killed): go()
    assert (tmp_path/'.out.partial/journal').read_text().count('\n')>4
    return go

# --- names in a plan

@pytest.mark.parametrize('name', ['l0.weight@../../a', 'l0.weight@/etc/x', 'l0.weight@..', 'l0.weight@', 'l0.weight@c', 'l0.weight@a@b',
    'l0.weight@a/../../b', 'l0.weight@\0', '__metadata__', '__metadata__@a', '@a'])
def test_names_that_are_no_heads(name, models, tmp_path):
    "Before anything is written; in memory too"
    plan = make_plan('standard', models)
    row = plan.table.iloc[[0]].assign(name=name)
    bad = Plan(pd.concat([plan.table, row], ignore_index=True), plan.meta)
    for out in (None, tmp_path/'out'):
        with pytest.raises(PreflightError) as e: merge(bad, models, out=out)
        assert 'What helps' in str(e.value)
    assert sorted(o.name for o in tmp_path.iterdir())==['a','b']

@pytest.mark.parametrize('size', [0, -1, True, float('nan'), float('inf'), '5GB', None])
def test_shard_size(size, models, tmp_path):
    with pytest.raises(ValueError, match='shard_size is'): merge(make_plan('standard', models), models, out=tmp_path/'out', shard_size=size)
    assert sorted(o.name for o in tmp_path.iterdir())==['a','b']

@pytest.mark.parametrize('beside', ['heads', 'model.safetensors/x.txt', 'heads.txt'])
def test_names_that_meet(beside, models, tmp_path):
    "A file beside the input that would lie where the result has a folder, and the other way round"
    (models['a']/'model.safetensors').rename(models['a']/'w.safetensors')
    (models['a']/beside).parent.mkdir(exist_ok=True)
    (models['a']/beside).write_text('x')
    plan = make_plan('standard', models)
    if beside=='heads.txt':
        assert (merge(plan, models, out=tmp_path/'out')/beside).is_file()
        return
    with pytest.raises(ValueError, match='as a file and a folder'): merge(plan, models, out=tmp_path/'out')
    assert sorted(o.name for o in tmp_path.iterdir())==['a','b']

# --- the place of the result

def test_out_of_place(models, tmp_path):
    plan = make_plan('standard', models)
    (tmp_path/'empty').mkdir()
    (tmp_path/'link').symlink_to('empty')
    (tmp_path/'dangling').symlink_to('nowhere')
    (tmp_path/'door').symlink_to('a')
    (tmp_path/'.out.partial').mkdir()
    shutil.copytree(models['a'], tmp_path/'.out.partial/data')
    before = files(tmp_path)
    wrong = {'link': 'is a link to empty', 'dangling': 'is a link to nowhere', 'a/out': 'which is read', 'door/out': 'which is read',
        'a/x/y/out': 'which is read', 'empty/..': 'name of its own', 'x'*250: 'name of its own'}
    for out,words in wrong.items():
        with pytest.raises((ValueError, FileExistsError), match=words): merge(plan, models, out=tmp_path/out)
        with pytest.raises((ValueError, FileExistsError), match=words): extract(models['a'], models['b'], tmp_path/out)
    with pytest.raises(ValueError, match='unfinished merge'):
        merge(plan, models | dict(a=tmp_path/'.out.partial/data'), out=tmp_path/'out')
    assert files(tmp_path)==before and sorted(o.name for o in (tmp_path/'a').iterdir())==['config.json','model.safetensors']

def test_out_where_a_disk_begins(models, tmp_path, monkeypatch):
    (tmp_path/'disk').mkdir()
    monkeypatch.setattr(os.path, 'ismount', lambda o: str(o)==str(tmp_path/'disk'))
    with pytest.raises(ValueError, match='a disk of its own'): merge(make_plan('standard', models), models, out=tmp_path/'disk')
    monkeypatch.setattr(os, 'access', lambda o, how: False)
    with pytest.raises(PermissionError, match='cannot be written: choose'): merge(make_plan('standard', models), models, out=tmp_path/'out')

def test_input_whose_name_is_no_text(models, tmp_path):
    "What a manifest could not name is refused before any work"
    odd = tmp_path/os.fsdecode(b'm\xff')
    try: shutil.copytree(models['a'], odd)
    except OSError: pytest.skip('no such names here')
    given = models | dict(a=odd)
    with pytest.raises(ValueError, match=r"m\\udcff.*rename it"): merge(make_plan('standard', given), given, out=tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_beside_a_file_is_fine(models, tmp_path):
    "A file is an input, not all that lies in its folder"
    one = {k: v/'model.safetensors' for k,v in models.items()}
    assert merge(make_plan('standard', one), one, out=models['a']/'out').is_dir()

# --- what lies where it grows

def link(p, victim): p.symlink_to(victim)
def second_name(p, victim): os.link(victim, p)
def pipe(p, victim): os.mkfifo(p)
def a_folder(p, victim): p.mkdir()
def huge(p, victim): (p.touch(), os.truncate(p, 1<<40))

kinds = [(at, f) for at in ('journal','data/model.safetensors','data/heads/a.safetensors','data/plan.csv') for f in (link, second_name, pipe)] + [
    ('journal', a_folder), ('journal', huge), ('data', link), ('data', pipe), ('data/heads', link), ('', link), ('', pipe), ('precious', a_folder)]

@pytest.mark.parametrize('at,make', kinds, ids=[f"{at or 'root'}-{f.__name__}" for at,f in kinds])
@pytest.mark.parametrize('fresh', [False, True], ids=['continued', 'fresh'])
def test_strange_files(at, make, fresh, half, tmp_path):
    "Refused, and nothing is opened, emptied, written or deleted"
    root = tmp_path/'.out.partial'
    if fresh:
        shutil.rmtree(root)
        (root/at).parent.mkdir(parents=True, exist_ok=True)
    elif (root/at).is_dir(): shutil.rmtree(root/at)
    else: (root/at).unlink(missing_ok=True)
    victim = tmp_path/'victim'
    if at in ('', 'data', 'data/heads'): (victim.mkdir(), (victim/'f').write_text('precious'))
    else: victim.write_text('precious'*1000)
    make(root/at if at else root, victim)
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match=r'in the way.*move it'): half()
    assert files(tmp_path)==before and os.path.lexists(root/at)

def test_another_put_in_its_place(half, tmp_path, monkeypatch):
    "Somebody deletes the growing folder and starts again: what that process has written so far is not published"
    real = folder._finish
    def meddle(part, *a):
        real(part, *a)
        shutil.rmtree(part.root)
        shutil.copytree(tmp_path/'ref', part.data)
        (part.root/'journal').touch()
        (part.data/'model.safetensors').write_bytes(b'half')
    monkeypatch.setattr(folder, '_finish', meddle)
    with pytest.raises(FileExistsError, match='put in place of'): half()
    assert not (tmp_path/'out').exists() and (tmp_path/'.out.partial/data/model.safetensors').read_bytes()==b'half'

# --- what the journal says

@pytest.mark.parametrize('line', [b'99999 0000000000000000\n', b'9'*5000+b' 0000000000000000\n', b'-1 0000000000000000\n', b'\xff\xfe\n',
    b'1 000000000000000g\n', b'\n\n\n', b'0 0000000000000000\n', b'1 0', '١ 0000000000000000\n'.encode(), b'complete\n', b'0 '*1000+b'\n'],
    ids=range(11))
def test_journal_lines(line, half, tmp_path):
    "A number of no piece, no number, a wrong checksum: the right bytes all the same"
    with open(tmp_path/'.out.partial/journal', 'ab') as f: f.write(line)
    if line==b'0 0000000000000000\n':
        with pytest.warns(UserWarning, match='made again'): half()
    else: half()
    assert files(tmp_path/'out')==files(tmp_path/'ref') and not (tmp_path/'.out.partial').exists()

def zeroed(f):
    with open(f, 'r+b') as o: (o.seek(5000), o.write(bytes(20_000)))
def flipped(f):
    data = bytearray(f.read_bytes())
    data[6000] ^= 1
    f.write_bytes(data)
def longer(f): f.write_bytes(f.read_bytes()+b'x'*9)
def shorter(f): os.truncate(f, 4500)
def empty(f): os.truncate(f, 0)
def absent(f): f.unlink()

@pytest.mark.parametrize('damage', [zeroed, flipped, longer, shorter, empty, absent])
def test_finished_pieces_are_checked(damage, half, tmp_path):
    damage(tmp_path/'.out.partial/data/model.safetensors')
    if damage is longer: half()
    else:
        with pytest.warns(UserWarning, match='finished pieces .* made again'): half()
    assert files(tmp_path/'out')==files(tmp_path/'ref')

def test_only_what_is_lost_is_made_again(half, tmp_path, monkeypatch):
    seen,real = [],stream._run_piece
    monkeypatch.setattr(stream, '_run_piece', lambda t, *a: (seen.append(t), real(t, *a))[1])
    n = (tmp_path/'.out.partial/journal').read_text().count('\n')-1
    flipped(tmp_path/'.out.partial/data/model.safetensors')
    with pytest.warns(UserWarning, match='^1 finished pieces'): half()
    all_of_them = len(stream.pieces(plan_rows(Plan.load(tmp_path/'out/plan.csv'), {k: Checkpoint(tmp_path/k) for k in 'ab'})))
    assert len(seen)==all_of_them-n+1

def test_input_changed_in_place(half, models, tmp_path):
    "Its size and time of writing are as before: what was merged of it before does not go with what would be merged now"
    f = models['a']/'model.safetensors'
    s = f.stat()
    flipped(f)
    os.utime(f, ns=(s.st_atime_ns, s.st_mtime_ns))
    with pytest.raises(FileExistsError, match='other inputs'): half()

def test_wrong_numbers_leave_nothing(models, tmp_path):
    "What cannot be mended by repeating is not kept"
    sd = net()
    sd['l2.weight'][3,4] = np.nan
    save_file(sd, models['b']/'model.safetensors')
    with pytest.raises(ValueError, match='NaN'): merge(make_plan('standard', models), models, out=tmp_path/'out')
    assert sorted(o.name for o in tmp_path.iterdir())==['a','b']

def test_hash_of_a_file_changed_in_place(tmp_path, monkeypatch):
    from spectrum_merging import files as module
    monkeypatch.setenv('SPECTRUM_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(module, 'LARGE', 1)
    monkeypatch.setattr(module.time, 'time_ns', lambda: 1<<62)
    f = tmp_path/'f'
    f.write_bytes(b'x'*100)
    s,first = f.stat(),known_sha256([f])[f]
    with open(f, 'r+b') as o: o.write(b'y')
    os.utime(f, ns=(s.st_atime_ns, s.st_mtime_ns))
    assert known_sha256([f])[f]!=first

def test_temporary_names_are_new(tmp_path, monkeypatch):
    "What lies under the name that a file is written under is not opened"
    monkeypatch.setattr(os, 'urandom', lambda n: b'guess')
    (tmp_path/'victim').write_text('precious')
    (tmp_path/f'.{b"guess".hex()}.f').symlink_to(tmp_path/'victim')
    with pytest.raises(FileExistsError):
        with atomic(tmp_path/'f') as tmp: tmp.write_text('x')
    assert (tmp_path/'victim').read_text()=='precious'

# --- a folder that says things of itself

def sealed(out, change):
    m = json.loads((out/'merge.json').read_text())
    change(m)
    m.pop('seal')
    m['seal'] = hashlib.sha256(json.dumps(m, sort_keys=True).encode()).hexdigest()
    (out/'merge.json').write_text(json.dumps(m))

@pytest.fixture
def out(models, tmp_path):
    (models['a']/'code.py').write_text('x = 1')
    merge(make_plan('standard', models), models, out=tmp_path/'out', shard_size=100_000)
    found = verify(tmp_path/'out', all=True)
    assert found.ok.all() and {'index','code of the input'} <= set(found.check)
    return tmp_path/'out'

def bad(out, **kw): return {(r.file, r.check) for r in verify(out, **kw).query('not ok').itertuples()}

@pytest.mark.parametrize('name', ['adapter_config.json', 'adapter_model.safetensors', 'modeling_x.py', 'pytorch_model.bin', 'model.safetensors',
    'heads/c.safetensors', 'heads/a/adapter_config.json', 'sub/deep/x', 'heads/README.md'])
def test_not_listed(name, out):
    (out/name).parent.mkdir(parents=True, exist_ok=True)
    (out/name).write_bytes(b'{}')
    assert bad(out)=={(name, 'not listed')}

@pytest.mark.parametrize('name', ['.gitattributes', '.git/config', '.cache/huggingface/x'])
def test_hidden_is_named(name, out):
    (out/name).parent.mkdir(parents=True, exist_ok=True)
    (out/name).write_text('x')
    found = verify(out)
    assert found.ok.all() and found[found.file==name.split('/')[0]].check.tolist()==['hidden, not looked at']

def test_links_in_a_folder(out, tmp_path):
    "A file that was moved out and linked is none of the folder"
    shutil.move(out/'config.json', tmp_path/'elsewhere')
    (out/'config.json').symlink_to(tmp_path/'elsewhere')
    (out/'dir').symlink_to(tmp_path/'a')
    os.mkfifo(out/'pipe')
    assert bad(out)=={('config.json', 'sha256'), ('config.json', 'not listed'), ('dir', 'not listed'), ('pipe', 'not listed')}

def test_downloaded_from_the_hub(out, tmp_path):
    "There every file is a link to one beside"
    snap,blobs = tmp_path/'hub/snapshots'/('ab'*20),tmp_path/'hub/blobs'
    blobs.mkdir(parents=True)
    for k in files(out):
        (snap/k).parent.mkdir(parents=True, exist_ok=True)
        h = hashlib.sha256((out/k).read_bytes()).hexdigest()
        shutil.copy(out/k, blobs/h)
        (snap/k).symlink_to(os.path.relpath(blobs/h, (snap/k).parent))
    assert verify(snap, all=True).ok.all()

@pytest.mark.parametrize('name', ['../outside', '/etc/passwd', '/dev/zero', 'sub/../../outside', 'nowhere', '', '.', 'evil.safetensors', 'evil.bin',
    'evil.py', 'C:\\x', 'a\0b'])
def test_listed_by_a_stranger(name, out, tmp_path):
    "A manifest with a fitting seal lists what lies elsewhere, or what no merge writes"
    (tmp_path/'outside').write_text('secret')
    h = hashlib.sha256(b'secret').hexdigest()
    if name.startswith('evil'): (out/name).write_text('secret')
    sealed(out, lambda m: m['files'].update({name: h}))
    assert bad(out)=={(name, 'code of the input' if name=='evil.py' else 'sha256')}

def test_changed_code(out):
    (out/'code.py').write_text('evil')
    sealed(out, lambda m: m['files'].update({'code.py': hashlib.sha256(b'evil').hexdigest()}))
    assert bad(out)=={('code.py', 'code of the input')}

@pytest.mark.parametrize('where', ['../../a/model.safetensors', 'evil.safetensors', '/etc/passwd', 3, None])
def test_index_that_leads_elsewhere(where, out):
    f = out/'model.safetensors.index.json'
    told = json.loads(f.read_text())
    told['weight_map']['l0.weight'] = where
    f.write_text(json.dumps(told))
    sealed(out, lambda m: m['files'].update({f.name: hashlib.sha256(f.read_bytes()).hexdigest()}))
    assert (f.name, 'index') in bad(out)

@pytest.mark.parametrize('at', ['', 'heads/a/', 'heads/b/'])
def test_index_that_leaves_out(at, out):
    "What an index does not lead to would be made up at random"
    f = out/at/'model.safetensors.index.json'
    told = json.loads(f.read_text())
    for k in list(told['weight_map']):
        f.write_text(json.dumps(dict(weight_map={o: v for o,v in told['weight_map'].items() if o!=k})))
        sealed(out, lambda m: m['files'].update({f'{at}{f.name}': hashlib.sha256(f.read_bytes()).hexdigest()}))
        assert bad(out)=={(f'{at}{f.name}', 'index')}

def test_ties_come_from_the_models(models, tmp_path):
    "A tensor that a manifest calls tied is missed all the same"
    plan = make_plan('standard', models)
    out = merge(plan, models, out=tmp_path/'out')
    sealed(out, lambda m: m['tied'].update({'l0.weight': 'l1.weight'}))
    assert bad(out)=={('merge.json', 'shared tensors')}
    sd = load_file(out/'model.safetensors')
    sd.pop('l0.weight')
    save_file(sd, out/'model.safetensors')
    assert {('merge.json', 'shared tensors'), ('model.safetensors', 'header')} <= bad(out)

@pytest.mark.parametrize('key', ['made_by','plan_digest','files_from','files','tied','inputs','outputs','dtype','shard_size'])
@pytest.mark.parametrize('value', [None, 3, 'x', [], [1], {'a': 1}, {'a': {}}, {'a': {'sha256': [], 'source': 3}}, 1e400, True, 'absent'],
    ids=range(11))
def test_kinds_of_entries(key, value, out):
    "A manifest with a fitting seal and entries of other kinds: a `ValueError`, or a check that fails"
    def change(m):
        m[key] = value
        if value=='absent': m.pop(key)
    sealed(out, change)
    if (key, value) in (('dtype', None), ('shard_size', 3)): return # the same files
    try: assert not verify(out).ok.all()
    except ValueError as e: assert len(str(e))>20
    except FileNotFoundError: assert key=='inputs'

def test_models_that_are_not_there(out):
    "The plan and the manifest name others"
    sealed(out, lambda m: m['inputs'].pop('b'))
    with pytest.raises(ValueError, match="name other models, 'b'"): verify(out)
    sealed(out, lambda m: m['inputs'].update(b=m['inputs']['a'], c=m['inputs']['a']))
    with pytest.raises(ValueError, match="name other models, 'c'"): verify(out)

def test_files_of_one_name(tmp_path):
    "A model with parts has several files of one name: each has its hash"
    for k in 'ab':
        d = tmp_path/k
        (d/'2_Dense').mkdir(parents=True)
        save_file({f'l{i}.weight': rng.standard_normal((9, 8)).astype('f4') for i in range(3)}, d/'model.safetensors')
        save_file({'linear.weight': rng.standard_normal((9, 8)).astype('f4')}, d/'2_Dense/model.safetensors')
        (d/'modules.json').write_text(json.dumps([dict(path='', type='x'), dict(path='2_Dense', type='y')]))
    models = {k: tmp_path/k for k in 'ab'}
    out = merge(make_plan('standard', models, heads=[]), models, out=tmp_path/'out')
    told = json.loads((out/'merge.json').read_text())['inputs']['a']['sha256']
    assert told=={k: hashlib.sha256((tmp_path/'a'/k).read_bytes()).hexdigest() for k in ('model.safetensors','2_Dense/model.safetensors')}
    assert verify(out, all=True).ok.all()
    for k in told:
        whole = (tmp_path/'a'/k).read_bytes()
        (tmp_path/'a'/k).write_bytes(whole[:-1]+bytes([whole[-1]^1]))
        assert (f'a: {k}', 'sha256') in bad(out)
        (tmp_path/'a'/k).write_bytes(whole)
