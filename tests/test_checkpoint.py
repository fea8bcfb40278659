"A `Checkpoint` opens every kind of source lazily and exactly, and refuses bad ones with a reason."
import json, os, pytest, torch
from resource import RUSAGE_SELF, getrusage
from safetensors.torch import save_file
from spectrum_merging.checkpoint import Checkpoint, TensorInfo
from torch import nn

index = 'model.safetensors.index.json'

def tensors():
    g = torch.Generator().manual_seed(0)
    t = torch.randn(3, 4, generator=g)
    dtypes = 'float64 float32 float16 bfloat16 float8_e4m3fn int64 int32 int16 int8'.split()
    return {f'as_{o}': (30*t).to(getattr(torch, o)) for o in dtypes} | dict(
        as_uint8=t.abs().mul(50).to(torch.uint8), as_bool=t>0, scalar=torch.tensor(2.5),
        count=torch.tensor(7), empty=torch.zeros(0), hollow=torch.zeros(3, 0, 2).bfloat16(),
        kernel=torch.randn(2, 3, 3, 3, generator=g))

def bits(t): return t.dtype,t.shape,t.contiguous().flatten().view(torch.uint8).tolist()

def shard(sd, d, n=3):
    "Write `sd` as `n` shards with an index"
    where = {k: f'model-{i%n+1:05}-of-{n:05}.safetensors' for i,k in enumerate(sd)}
    for f in set(where.values()): save_file({k: v for k,v in sd.items() if where[k]==f}, d/f)
    (d/index).write_text(json.dumps(dict(metadata={}, weight_map=where)))

def module(sd):
    m = nn.Module()
    for k,v in sd.items(): m.register_buffer(k, v)
    return m

def as_file(sd, d): save_file(sd, d/'weights.safetensors'); return d/'weights.safetensors'
def as_folder(sd, d): save_file(sd, d/'model.safetensors'); return d
def as_pt(sd, d): torch.save(sd, d/'m.pt'); return d/'m.pt'
def as_bin(sd, d):
    torch.save(sd, d/'pytorch_model.bin')
    (d/'training_args.bin').write_bytes(b'x')
    return d
def as_bin_shards(sd, d):
    names = list(sd)
    for i,ks in enumerate((names[:5], names[5:])): torch.save({k: sd[k] for k in ks}, d/f'p{i}.bin')
    where = {k: f'p{int(i>=5)}.bin' for i,k in enumerate(names)}
    (d/'pytorch_model.bin.index.json').write_text(json.dumps(dict(weight_map=where)))
    return d
def as_nested(sd, d): torch.save(dict(state_dict=sd, epoch=3), d/'m.pt'); return d/'m.pt'
def as_odd_folder(sd, d): save_file(sd, d/'adapter.safetensors'); return d
def as_shards(sd, d): shard(sd, d); return d
def as_index(sd, d): shard(sd, d); return d/index

sources = dict(module=lambda sd, d: module(sd), dict=lambda sd, d: sd,
    state_dict=lambda sd, d: module(sd).state_dict(), file=as_file,
    text=lambda sd, d: str(as_file(sd, d)), folder=as_folder, odd_folder=as_odd_folder,
    shards=as_shards, index=as_index, pt=as_pt, bin=as_bin,
    bin_shards=as_bin_shards, nested_pt=as_nested, checkpoint=lambda sd, d: Checkpoint(as_file(sd, d)))

@pytest.mark.parametrize('make', sources.values(), ids=sources)
def test_round_trip(make, tmp_path):
    "Every name, shape, dtype and bit, from every kind of source"
    sd = tensors()
    ck = Checkpoint(make(sd, tmp_path))
    assert ck.infos == {k: TensorInfo(tuple(v.shape), v.dtype) for k,v in sd.items()}
    assert set(ck) == set(sd) and len(ck) == len(sd) and 'kernel' in ck and 'nothing' not in ck
    assert [k for k,v in sd.items() if bits(ck.read(k))!=bits(v)] == []
    assert f'{len(sd)} tensors, {sum(v.numel() for v in sd.values())} values' in repr(ck)

def test_old_pickle(tmp_path):
    "Files from before 2020 are no archives and cannot be mapped"
    sd = dict(w=torch.randn(3, 4), n=torch.tensor(3))
    torch.save(sd, tmp_path/'m.pth', _use_new_zipfile_serialization=False)
    ck = Checkpoint(tmp_path)
    assert [k for k in sd if bits(ck.read(k))!=bits(sd[k])] == [] and ck.files==[tmp_path/'m.pth']

def test_is_float():
    assert {k for k,v in Checkpoint(tensors()).infos.items() if not v.is_float} == {
        'as_int64','as_int32','as_int16','as_int8','as_uint8','as_bool','count'}

def test_order(): assert list(Checkpoint(dict(b=torch.ones(1), a=torch.ones(1)))) == ['b','a']

def test_needs_no_gradient():
    lin = nn.Linear(2, 3)
    t = Checkpoint(lin).read('weight')
    assert not t.requires_grad and t.equal(lin.weight)
    assert not Checkpoint(dict(lin.named_parameters())).read('weight').requires_grad

def test_tied():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5), nn.Linear(3, 5))
    net[1].weight = net[2].weight = net[0].weight
    assert Checkpoint(net).aliases == {'1.weight': '0.weight', '2.weight': '0.weight'}
    assert Checkpoint(Checkpoint(net)).aliases == Checkpoint(net).aliases
    t = torch.ones(4, 4)
    views = dict(a=t, b=t[:2], c=t.T, d=t.clone(), e=torch.ones(0), f=torch.ones(0))
    assert Checkpoint(views).aliases == {}

def test_opening_reads_no_values(monkeypatch, tmp_path):
    "The header is enough: values are read piece by piece, when asked for"
    import spectrum_merging.stored as mod
    shard(tensors(), tmp_path)
    read,real = [],mod.InputFile.read_into
    def spy(self, buf, offset):
        read.append(len(memoryview(buf).cast('B')))
        real(self, buf, offset)
    monkeypatch.setattr(mod.InputFile, 'read_into', spy)
    ck = Checkpoint(tmp_path)
    size = sum(8+int.from_bytes(o.open('rb').read(8), 'little') for o in tmp_path.glob('*.safetensors'))
    ck.infos, len(ck), repr(ck), Checkpoint(ck)
    assert sum(read)==size
    ck.read('kernel')
    assert sum(read)==size+ck.infos['kernel'].nbytes
    part = bytearray(8)
    ck.read_into('kernel', part, 4)
    assert bytes(part)==ck.read('kernel').numpy().tobytes()[4:12]

def test_opening_takes_no_memory(tmp_path):
    "A sparse file of 2 GiB opens at once"
    w = dict(dtype='F32', shape=[2**14, 2**15], data_offsets=[0, 2**31])
    head = json.dumps(dict(w=w)).encode()
    with (tmp_path/'big.safetensors').open('wb') as f:
        f.write(len(head).to_bytes(8, 'little')+head)
        f.truncate(8+len(head)+2**31)
    before = getrusage(RUSAGE_SELF).ru_maxrss
    assert Checkpoint(tmp_path).infos == dict(w=TensorInfo((2**14, 2**15), torch.float32))
    assert getrusage(RUSAGE_SELF).ru_maxrss-before < 100_000 # KiB

# --- damaged and wrong sources

def cut(d):
    f = as_file(tensors(), d)
    f.write_bytes(f.read_bytes()[:-8])
    return f
def header(d):
    f = as_file(tensors(), d)
    f.write_bytes(f.read_bytes()[:8] + b'?'*100 + f.read_bytes()[108:])
    return f
def put(d, name, data):
    (d/name).write_bytes(data)
    return d/name
def lost_shard(d):
    shard(tensors(), d)
    (d/'model-00002-of-00003.safetensors').unlink()
    return d
def cut_shard(d):
    shard(tensors(), d)
    f = d/'model-00002-of-00003.safetensors'
    f.write_bytes(f.read_bytes()[:50])
    return d
def lost_tensor(d):
    shard(tensors(), d)
    where = json.loads((d/index).read_text())
    where['weight_map']['layer9.weight'] = 'model-00001-of-00003.safetensors'
    put(d, index, json.dumps(where).encode())
    return d
def bad_index(text): return lambda d: (shard(tensors(), d), put(d, index, text))[1]
def pickled(name):
    def make(d):
        torch.save(tensors() | dict(hook=os.getcwd), d/name)
        return d
    return make
def two(d):
    for k in 'ab': save_file(tensors(), d/f'{k}.safetensors')
    return d

@pytest.mark.parametrize('make,error,words', [
    (cut, ValueError, ['weights.safetensors', 'download or export it again']),
    (header, ValueError, ['weights.safetensors', 'download or export it again']),
    (lambda d: put(d, 'x.safetensors', b''), ValueError,
        ['x.safetensors', 'download or export it again']),
    (lambda d: put(d, 'x.safetensors', b'\xff'*500), ValueError,
        ['x.safetensors', 'download or export it again']),
    (lost_shard, FileNotFoundError, [index, 'missing shards: model-00002-of-00003.safetensors',
        'complete']),
    (cut_shard, ValueError, ['model-00002-of-00003.safetensors', 'download or export it again']),
    (lost_tensor, ValueError, [index, 'layer9.weight', '1 in all', 'download']),
    (bad_index(b'not json'), ValueError, [index, 'weight_map']),
    (bad_index(b'\xff\xfe\x00'), ValueError, [index, 'weight_map']),
    (bad_index(b'{}'), ValueError, [index, 'weight_map']),
    (bad_index(b'[]'), ValueError, [index, 'weight_map']),
    (bad_index(b'{"weight_map": []}'), ValueError, [index, 'weight_map']),
    (bad_index(b'{"weight_map": {"a": 1}}'), ValueError, [index, 'weight_map']),
    (bad_index(b'{"weight_map": {}}'), ValueError, ['no tensors']),
    (pickled('pytorch_model.bin'), ValueError, ['pickle', 'run code', 'save_file']),
    (pickled('model.pt'), ValueError, ['pickle', 'run code', 'save_file']),
    (pickled('model.pth'), ValueError, ['pickle', 'run code', 'save_file']),
    (lambda d: pickled('m.pt')(d)/'m.pt', ValueError, ['m.pt', 'run code', 'state dict']),
    (lambda d: put(d, 'm.pt', b'junk'), ValueError, ['m.pt', 'PyTorch file', 'download']),
    (lambda d: put(d, 'm.bin', b''), ValueError, ['m.bin', 'PyTorch file', 'download']),
    (lambda d: put(d, 'm.txt', b''), ValueError, ['m.txt', 'no file of weights', '.safetensors']),
    (two, FileNotFoundError, ['2 safetensors files', 'name one']),
    (lambda d: d, FileNotFoundError, ['holds no model.safetensors']),
    (lambda d: d/'nowhere', FileNotFoundError, ['nowhere does not exist', 'hub id']),
    (lambda d: str(d/'nowhere'), FileNotFoundError, ['nowhere does not exist', 'hub id']),
    (lambda d: './nowhere', FileNotFoundError, ['./nowhere does not exist', 'hub id']),
    (lambda d: 'one-word', FileNotFoundError, ['one-word does not exist', 'hub id']),
    (lambda d: as_file({}, d), ValueError, ['weights.safetensors', 'no tensors']),
    (lambda d: {}, ValueError, ['dict holds no tensors']),
    (lambda d: nn.ReLU(), ValueError, ['ReLU holds no tensors']),
    (lambda d: None, TypeError, ['NoneType', 'state dict', 'path']),
    (lambda d: 3, TypeError, ['int', 'state dict', 'path']),
    (lambda d: torch.ones(2), TypeError, ['Tensor', 'state dict', 'path']),
    (lambda d: [torch.ones(2)], TypeError, ['list', 'state dict', 'path']),
    (lambda d: dict(a=torch.ones(2), b=[1.]), TypeError, ["'b'", 'list', 'names to tensors']),
    (lambda d: dict(state_dict=tensors()), TypeError, ["'state_dict'", 'dict', 'names to tensors']),
    (lambda d: {0: torch.ones(2)}, TypeError, ['entry 0', 'names to tensors']),
    (lambda d: nn.Linear(2, 2, device='meta'), ValueError,
        ['weight', 'meta device', 'load the weights'])],
    ids='''cut header nothing garbage lost_shard cut_shard lost_tensor no_json no_text no_map
    no_object list_map int_map empty_map bin pt pth pt_file junk_pt empty_bin text two_files empty_folder no_path
    no_path_text no_relative no_word empty_file empty_dict no_weights none int tensor list
    no_tensor nested int_name meta'''.split())
def test_refused(make, error, words, tmp_path):
    with pytest.raises(error) as e: Checkpoint(make(tmp_path))
    assert [o for o in words if o not in str(e.value)] == []

def test_hub_unreachable(monkeypatch):
    def refuse(*a, **kw): raise OSError('no network')
    monkeypatch.setattr('huggingface_hub.snapshot_download', refuse)
    words = 'org/name is neither a path here nor a hub id.*no network'
    with pytest.raises(FileNotFoundError, match=words): Checkpoint('org/name')

def test_hub(monkeypatch, tmp_path):
    "A hub id brings weights and small files, and never a pickle"
    asked = {}
    def fetch(name, **kw): asked.update(name=name, **kw); return str(as_shards(tensors(), tmp_path))
    monkeypatch.setattr('huggingface_hub.snapshot_download', fetch)
    assert len(Checkpoint('org/name')) == len(tensors()) and asked['name']=='org/name'
    assert '*.safetensors' in asked['allow_patterns']
    assert not {'*', '*.bin', '*.pt'} & set(asked['allow_patterns'])

def test_hub_without_safetensors(monkeypatch, tmp_path):
    "Pickled weights come only where there are no others, and are opened safely"
    torch.save(tensors(), tmp_path/'pytorch_model.bin')
    asked = []
    def fetch(name, allow_patterns): asked.append(allow_patterns); return str(tmp_path)
    monkeypatch.setattr('huggingface_hub.snapshot_download', fetch)
    assert len(Checkpoint('org/name'))==len(tensors())
    assert ['*.bin' in o for o in asked]==[False, True]

def test_unknown_tensor(tmp_path):
    ck = Checkpoint(as_file(tensors(), tmp_path))
    with pytest.raises(KeyError, match="no tensor 'x'"): ck.read('x')
