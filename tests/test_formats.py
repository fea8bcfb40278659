"What a file is: named before work, weights found in wrappers, codes computed or refused, many files at once."
import json, numpy as np, os, pathlib, pytest, subprocess, sys, torch
from argparse import Namespace
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from spectrum_merging import files
from spectrum_merging.checkpoint import Checkpoint
from spectrum_merging.merge import merge
from spectrum_merging.plan import make_plan
from spectrum_merging.quantised import dequantised
from types import ModuleType

def R(*s, seed=0): return torch.randn(s, generator=torch.Generator().manual_seed(seed))

heads = {'LFS': (b'version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n', 'git lfs pull'),
    'html': (b'<!doctype html>\n<html>', 'HTML'), 'xml': (b'<?xml version="1.0"?><Error>', 'XML'),
    'json': (b'{"error":"Repository not found"}', 'answer of a server'), 'text': (b'Entry not found', 'answer of a server'),
    'gguf': (b'GGUF\x03\0\0\0'+bytes(99), 'GGUF'), 'ggml': (b'lmgg'+bytes(99), 'GGML'), 'h5': (b'\x89HDF\r\n\x1a\n'+bytes(99), 'HDF5'),
    'tflite': (b'\x1c\0\0\0TFL3'+bytes(99), 'Lite'), 'npy': (b'\x93NUMPY\x01\0', 'NumPy'), 'tar': (bytes(257)+b'ustar\0'+bytes(300), 'unpack'),
    'gzip': (b'\x1f\x8b\x08\0', 'compressed'), 'onnx': (b'\x08\x08\x12\x07pytorch\x1a\x052.1.0', 'ONNX'),
    'msgpack': (b'\x82\xa5model\x81\xa6kernel', 'Flax')}

@pytest.mark.parametrize('kind', heads)
@pytest.mark.parametrize('name', ['model.safetensors','pytorch_model.bin','model.pt','last.ckpt','best.pth.tar'])
@pytest.mark.parametrize('whole', [True, False])
def test_foreign_files_are_named(kind, name, whole, tmp_path):
    "In a folder and alone, whatever they are called"
    head,word = heads[kind]
    (tmp_path/name).write_bytes(head)
    with pytest.raises(ValueError) as e: Checkpoint(tmp_path if whole else tmp_path/name)
    assert word in str(e.value) and name in str(e.value) and 'run code' not in str(e.value)

def test_pointers_among_shards(tmp_path):
    (tmp_path/'m-1.safetensors').write_bytes(heads['LFS'][0])
    (tmp_path/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=dict(w='m-1.safetensors'))))
    with pytest.raises(ValueError, match='git lfs pull'): Checkpoint(tmp_path)

def test_zips(tmp_path):
    import numpy as np
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path/'s.pt')
    np.savez(tmp_path/'n.pt.npz', w=np.ones(3))
    os.rename(tmp_path/'n.pt.npz', tmp_path/'n.pt')
    with pytest.raises(ValueError, match='TorchScript.*jit.load'): Checkpoint(tmp_path/'s.pt')
    with pytest.raises(ValueError, match='NumPy'): Checkpoint(tmp_path/'n.pt')

def test_names_that_lie(tmp_path):
    "A safetensors file called .bin opens; a pickle called .safetensors is named"
    sd = dict(w=R(3, 3))
    save_file(sd, tmp_path/'m.bin')
    assert Checkpoint(tmp_path/'m.bin').read('w').equal(sd['w'])
    torch.save(sd, tmp_path/'m.safetensors')
    with pytest.raises(ValueError, match='rename it to .bin'): Checkpoint(tmp_path/'m.safetensors')

@pytest.mark.parametrize('name,word', [('m.gguf','GGUF'),('m.h5','TensorFlow'),('flax_model.msgpack','Flax'),('m.onnx','ONNX'),
    ('model.ckpt.index','TensorFlow'),('__0_0.distcp','dcp_to_torch')])
def test_foreign_names(name, word, tmp_path):
    (tmp_path/name).write_bytes(b'?'*64)
    for src in (tmp_path, tmp_path/name):
        with pytest.raises((ValueError, FileNotFoundError), match=word): Checkpoint(src)

folders = {'DeepSpeed': ['global_step100/','zero_to_fp32.py','latest'], 'dcp_to_torch': ['pytorch_model_fsdp_0/','.metadata'],
    'Megatron': ['iter_0000100/','latest_checkpointed_iteration.txt'], 'mp_rank_00': ['mp_rank_00/'], 'checkpoint-20': ['checkpoint-10/','checkpoint-20/'],
    'zero_to_fp32': ['zero_pp_rank_0_mp_rank_00_optim_states.pt','mp_rank_00_model_states.pt','mp_rank_01_model_states.pt'],
    "Meta's own": ['consolidated.00.pth','consolidated.01.pth','params.json'], 'TensorFlow': ['tf_model.h5','config.json']}

@pytest.mark.parametrize('word', folders)
def test_foreign_folders(word, tmp_path):
    for o in folders[word]: (tmp_path/o).mkdir() if o[-1]=='/' else (tmp_path/o).write_bytes(b'')
    with pytest.raises((ValueError, FileNotFoundError), match=word): Checkpoint(tmp_path)

def test_deepspeed_folder_with_whole_weights(tmp_path):
    "Stages 1 and 2 leave whole weights beside their state"
    (tmp_path/'global_step3').mkdir()
    (tmp_path/'zero_to_fp32.py').write_text('')
    save_file(dict(w=R(2, 2)), tmp_path/'model.safetensors')
    assert list(Checkpoint(tmp_path))==['w']

def test_placeholders(tmp_path):
    "What ZeRO-3 and FSDP leave is no model"
    z = {f'l{i}.{p}': R(4, 4) if p=='weight' else R(4) for i in range(3) for p in ('weight','bias')}
    small = z | {k: torch.empty(0) for k in z if 'weight' in k} # small ones are kept whole
    for bad in (small, {k: torch.empty(0) for k in z}):
        save_file(bad, tmp_path/'model.safetensors')
        with pytest.raises(ValueError, match='ZeRO-3.*zero_to_fp32'): Checkpoint(tmp_path)
    save_file(z | {'extra': torch.empty(0, 4)}, tmp_path/'model.safetensors')
    assert len(Checkpoint(tmp_path))==7
    with pytest.raises(ValueError, match='FSDP'): Checkpoint({'m._flat_param': R(99)})

# --- wrappers

W = dict(w=R(2, 3), b=R(3))
ema = {k: v+1 for k,v in W.items()}

@pytest.mark.parametrize('data,note', [(dict(state_dict=W, epoch=3, optimizer_states=[], hyper_parameters=dict(lr=.1)), None),
    (dict(model_state_dict=W, optimizer_state_dict=dict(state={}, param_groups=[])), None), (dict(model=W, optimizer=dict(x=R(2))), None),
    (dict(state_dict=W, state_dict_ema=ema), 'EMA'), (dict(model=W, model_ema=ema), 'EMA'), (dict(params=W, params_ema=ema), 'EMA'),
    (dict(net=W), None), (dict(model=dict(state_dict=W)), None), (dict(state_dict_ema=W), 'EMA'), (dict(params_ema=W, epoch=1), 'EMA'),
    (dict(unusual=W, epoch=2), 'unusual'), (OrderedDict(W), None)])
@pytest.mark.parametrize('name', ['m.ckpt','m.pth.tar','m.pt','m.tar','m.pkl'])
def test_wrappers(data, note, name, tmp_path):
    torch.save(data, tmp_path/name)
    for src in (tmp_path, tmp_path/name):
        ck = Checkpoint(src)
        assert all(ck.read(k).equal(v) for k,v in W.items()) and len(ck)==2
        assert (note is None)==(ck.notes==[]) and (note or '') in ''.join(ck.notes)

@pytest.mark.parametrize('data', [dict(generator=W, discriminator=ema), dict(state_dict=W, model=ema), dict(student=W, teacher=ema), dict(ema=W, model_ema=ema)])
def test_several_state_dicts(data, tmp_path):
    torch.save(data, tmp_path/'m.pt')
    with pytest.raises(ValueError, match='several state dicts.*'+next(iter(data))): Checkpoint(tmp_path/'m.pt')

def lightning():
    "Modules with the classes that Lightning's files name"
    mod = ModuleType('lightning.fabric.utilities.data')
    mod.AttributeDict = type('AttributeDict', (dict,), dict(__module__=mod.__name__, __qualname__='AttributeDict'))
    return mod

def test_hyper_parameters(tmp_path, monkeypatch):
    "Arguments are let in as data; other classes are named"
    mod = lightning()
    for i,o in enumerate(('lightning','lightning.fabric','lightning.fabric.utilities',mod.__name__)): monkeypatch.setitem(sys.modules, o, mod)
    for i,h in enumerate((Namespace(lr=np.float64(.1)), mod.AttributeDict(lr=.1), pathlib.PosixPath('a/b'), dict(a=Namespace(x=[1, 2])))):
        torch.save(dict(state_dict=W, hyper_parameters=h), tmp_path/f'{i}.ckpt')
    for o in ('lightning','lightning.fabric','lightning.fabric.utilities',mod.__name__): monkeypatch.delitem(sys.modules, o)
    for i in range(4): assert Checkpoint(tmp_path/f'{i}.ckpt').read('w').equal(W['w'])
    torch.save(dict(state_dict=W, hyper_parameters=dict(f=os.getcwd)), tmp_path/'bad.ckpt')
    with pytest.raises(ValueError, match=r'holds more than tensors \(a \S*getcwd\).*run code'): Checkpoint(tmp_path/'bad.ckpt')

def test_training_state(tmp_path):
    torch.save(W, tmp_path/'pytorch_model.bin')
    for o in '''optimizer.pt scheduler.pt training_args.bin rng_state_0.pth rng_state.pth optimizer.bin optimizer_1.bin scheduler.bin
            scaler.pt random_states_0.pkl sampler.bin'''.split(): torch.save(dict(x=R(1)), tmp_path/o)
    assert Checkpoint(tmp_path).files==[tmp_path/'pytorch_model.bin']
    os.rename(tmp_path/'pytorch_model.bin', tmp_path/'epoch3.pt')
    assert Checkpoint(tmp_path).files==[tmp_path/'epoch3.pt']

def test_file_in_place_of_its_folder(tmp_path):
    save_file(W, tmp_path/'model.safetensors')
    assert Checkpoint(tmp_path/'model.safetensors').folder is None
    (tmp_path/'config.json').write_text('{"model_type": "bert"}')
    ck = Checkpoint(tmp_path/'model.safetensors')
    assert ck.folder==tmp_path and ck.config==dict(model_type='bert')

# --- an index that lists tied tensors

def shards(d, sd, ghosts, config):
    save_file(sd, d/'m.safetensors')
    (d/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map={k: 'm.safetensors' for k in [*sd, *ghosts]})))
    (d/'config.json').write_text(json.dumps(config))
    return d

@pytest.mark.parametrize('arch,target,ghost,more,ok', [
    ('T5ForConditionalGeneration','shared.weight','encoder.embed_tokens.weight', {}, True),
    ('T5ForConditionalGeneration','shared.weight','lm_head.weight', {}, True),
    ('T5ForConditionalGeneration','shared.weight','lm_head.weight', dict(tie_word_embeddings=False), False),
    ('BartForConditionalGeneration','model.shared.weight','lm_head.weight', {}, True),
    ('GPT2LMHeadModel','transformer.wte.weight','lm_head.weight', {}, True),
    ('GPT2LMHeadModel','transformer.wpe.weight','lm_head.weight', {}, False),
    ('T5ForConditionalGeneration','shared.weight','encoder.block.0.weight', {}, False),
    ('os','shared.weight','encoder.embed_tokens.weight', {}, False), (None,'shared.weight','encoder.embed_tokens.weight', {}, False)])
def test_tied_in_index(arch, target, ghost, more, ok, tmp_path):
    d = shards(tmp_path, {target: R(4, 4), 'x': R(3)}, [ghost], dict(architectures=[arch]) | more)
    if ok:
        ck = Checkpoint(d)
        assert set(ck)=={target, 'x'} and ck.aliases=={ghost: target} and ghost in ck.notes[0]
    else:
        with pytest.raises(ValueError, match='shards lack: '+ghost): Checkpoint(d)

# --- many files

def many(d, seed, n):
    d.mkdir()
    sd = {f'l{i}.weight': R(3, 4, seed=seed*1000+i) for i in range(n)}
    for i,(k,v) in enumerate(sd.items()): save_file({k: v}, d/f'm{i}.safetensors')
    (d/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map={k: f'm{i}.safetensors' for i,k in enumerate(sd)})))
    return sd

def test_300_shards_and_256_handles(tmp_path):
    a,b = (many(tmp_path/o, i, 300) for i,o in enumerate('ab'))
    exe = os.path.join(os.path.dirname(sys.executable), 'spectrum-merge')
    for i,args in enumerate(((), ('--strategy','tsv_m','--base','a'))):
        p = subprocess.run(f'ulimit -n 256; {exe} a b {" ".join(args)} --out o{i}', shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert p.returncode==0, p.stderr
    o = load_file(tmp_path/'o0/model.safetensors')
    assert all(torch.allclose(o[k], (a[k]+b[k])/2) for k in a)

def test_handles_side_by_side(tmp_path, monkeypatch):
    "Threads read right while files are closed under them"
    monkeypatch.setattr(files, 'OPEN_FILES', 2)
    sd = many(tmp_path/'a', 0, 24)
    ck = Checkpoint(tmp_path/'a')
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20): assert all(pool.map(lambda k: ck.read(k).equal(sd[k]), sd))

def test_files_are_closed(tmp_path):
    many(tmp_path/'a', 0, 9)
    before = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 0
    ck = Checkpoint(tmp_path/'a')
    del ck
    if before: assert len(os.listdir('/proc/self/fd'))==before

# --- codes

class Entry:
    def __new__(cls, t): return Checkpoint({'t': t})._entries['t']

fp8_config = dict(quant_method='fp8', weight_block_size=[128, 128])

@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 4), cols=st.integers(1, 4), m=st.integers(1, 9), n=st.integers(1, 9), experts=st.sampled_from([0, 1, 3]),
    code=st.sampled_from(['float8_e4m3fn','float8_e5m2']), dtype=st.sampled_from([None,'float32','bfloat16','float16']),
    scale=st.sampled_from(['float32','bfloat16','uint8']), seed=st.integers(0, 99), at=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_fp8_is_that_of_transformers(rows, cols, m, n, experts, code, dtype, scale, seed, at):
    "Every bit, read whole and from anywhere to anywhere"
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    lead = (experts,) if experts else ()
    q = R(*lead, rows*m, cols*n, seed=seed).mul(3).to(getattr(torch, code))
    s = R(*lead, rows, cols, seed=seed+1).abs()
    s = (s*20+100).to(torch.uint8) if scale=='uint8' else s.to(getattr(torch, scale))
    config = dict(quantization_config=dict(quant_method='fp8')) | (dict(dtype=dtype) if dtype else {})
    entries,note = dequantised({'q.weight': Entry(q), 'q.weight_scale_inv': Entry(s)}, config)
    true = Fp8Dequantize(None)._dequantize_one(q, s, dtype and getattr(torch, dtype))
    t = entries['q.weight'].tensor()
    assert t.dtype==true.dtype and t.equal(true) and note
    flat = true.flatten().view(torch.uint8)
    a,b = sorted(int(o*flat.numel()) for o in at)
    buf = bytearray(b-a)
    entries['q.weight'].read_into(buf, a)
    assert bytes(buf)==flat[a:b].numpy().tobytes()

def test_fp8_ends_within_a_block():
    "Blocks of the size that the configuration names go on beyond the edge; without it, the grid would have to divide"
    q,s = R(200, 150).to(torch.float8_e4m3fn),R(2, 2).abs()
    sd = {'q.weight': Entry(q), 'q.weight_scale_inv': Entry(s)}
    t = dequantised(sd, dict(quantization_config=fp8_config))[0]['q.weight'].tensor()
    assert t.equal(q.float()*s.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :150])
    q = R(201, 150).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match='float8.*dequantise'):
        dequantised({'q.weight': Entry(q), 'q.weight_scale_inv': Entry(s)}, dict(quantization_config=dict(quant_method='fp8')))

@pytest.mark.parametrize('shape', [(), (1,), (1, 1), (6,), (6, 1)])
@pytest.mark.parametrize('name,method', [('weight_scale','compressed-tensors'),('weight_scale','fbgemm_fp8'),('weight_scale_inv','fp8')])
def test_scales_per_row_and_tensor(shape, name, method):
    q,s = R(6, 4).to(torch.float8_e4m3fn),R(*shape).abs()
    sd = {'q.weight': Entry(q), f'q.{name}': Entry(s), 'q.input_scale': Entry(torch.ones(1)), 'q.bias': Entry(R(6))}
    entries,_ = dequantised(sd, dict(dtype='float32', quantization_config=dict(quant_method=method)))
    assert list(entries)==['q.weight','q.bias']
    assert entries['q.weight'].tensor().equal(q.float()*(s.reshape(-1, 1) if s.numel()>1 else s.reshape(())))

def nf4(W, blocksize=64, nested=True, dtype='float16', kind='nf4'):
    "What bitsandbytes writes, and what it reads back, after its own formulas"
    table = torch.tensor([-1., -.6962, -.5251, -.3949, -.2844, -.1848, -.0911, 0., .0796, .1609, .2461, .3379, .4407, .5626, .723, 1.])
    x = W.flatten()
    pad = torch.cat([x, x.new_zeros(-len(x) % blocksize)]).reshape(-1, blocksize)
    top = pad.abs().amax(1).clamp(min=1e-6)
    c = ((pad/top[:, None])[..., None]-table).abs().argmin(-1).flatten()[:len(x)]
    c2 = torch.cat([c, c.new_zeros(len(c) % 2)])
    packed = (c2[::2]*16+c2[1::2]).to(torch.uint8)[:, None]
    state = dict(quant_type=kind, blocksize=blocksize, dtype=dtype, shape=list(W.shape))
    sd = {'weight': packed, 'weight.quant_map': table}
    if nested:
        code2,size2 = torch.linspace(-1, 1, 256),256
        offset = top.mean()
        t = torch.cat([top-offset, top.new_zeros(-len(top) % size2)]).reshape(-1, size2)
        top2 = t.abs().amax(1).clamp(min=1e-6)
        q = ((t/top2[:, None])[..., None]-code2).abs().argmin(-1).flatten()[:len(top)].to(torch.uint8)
        state |= dict(nested_blocksize=size2, nested_dtype='float32', nested_offset=offset.item())
        sd |= {'weight.absmax': q, 'weight.nested_absmax': top2, 'weight.nested_quant_map': code2}
        top = code2[q.long()]*top2[torch.arange(len(q))//size2]+torch.tensor(float(state['nested_offset']))
    else: sd |= {'weight.absmax': top}
    sd[f'weight.quant_state.bitsandbytes__{kind}'] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return sd,(table[c]*top[torch.arange(len(c))//blocksize]).to(getattr(torch, dtype)).reshape(W.shape)

@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), cols=st.integers(1, 40), nested=st.booleans(), dtype=st.sampled_from(['float16','bfloat16','float32']),
    blocksize=st.sampled_from([64, 128]), seed=st.integers(0, 99), at=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_four_bits(rows, cols, nested, dtype, blocksize, seed, at):
    sd,true = nf4(R(rows, cols, seed=seed), blocksize, nested, dtype)
    entries,note = dequantised({f'l.{k}': Entry(v) for k,v in sd.items()} | {'n.weight': Entry(R(3))}, {})
    assert list(entries)==['l.weight','n.weight'] and 'bitsandbytes' in note
    assert entries['l.weight'].tensor().equal(true)
    flat = true.flatten().view(torch.uint8)
    a,b = sorted(int(o*flat.numel()) for o in at)
    buf = bytearray(b-a)
    entries['l.weight'].read_into(buf, a)
    assert bytes(buf)==flat[a:b].numpy().tobytes()

@pytest.mark.parametrize('change', [lambda s: s.pop('blocksize'), lambda s: s.update(blocksize=0), lambda s: s.update(shape=[4, 5]), lambda s: s.update(dtype='int8'),
    lambda s: s.update(shape='ab'), lambda s: s.pop('nested_offset'), lambda s: s.update(nested_offset='x'), lambda s: s.update(blocksize=32)])
def test_states_that_make_no_sense(change):
    sd,_ = nf4(R(16, 16))
    k = 'weight.quant_state.bitsandbytes__nf4'
    state = json.loads(bytes(sd[k].tolist()))
    change(state)
    sd[k] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match='quant_state.*integers cannot be merged.*dequantise'): Checkpoint({f'l.{k}': v for k,v in sd.items()})

def test_eight_bits():
    q,s = R(6, 5).mul(40).to(torch.int8),R(6).abs()
    sd = {'l.weight': q, 'l.SCB': s, 'l.weight_format': torch.tensor(0, dtype=torch.uint8), 'l.bias': R(6)}
    ck = Checkpoint(sd)
    assert set(ck)=={'l.weight','l.bias'} and ck.dequantised
    assert ck.read('l.weight').equal(q*s.view(-1, 1)*7.874015718698502e-3) # bitsandbytes' formula, by torch
    with pytest.raises(ValueError, match='row-major'): Checkpoint(sd | {'l.weight_format': torch.tensor(2, dtype=torch.uint8)})

i = lambda *s: torch.ones(*s).int()
u = lambda *s: torch.ones(*s).to(torch.uint8)
f8 = lambda *s: torch.ones(*s).to(torch.float8_e4m3fn)
refused = {'GPTQ': {'l.qweight': i(2, 8), 'l.qzeros': i(1, 1), 'l.scales': R(1, 8).half(), 'l.g_idx': i(16)}, 'AWQ': {'l.qweight': i(2, 8), 'l.qzeros': i(1, 1), 'l.scales': R(1, 8)},
    'compressed-tensors': {'l.weight_packed': i(2, 2), 'l.weight_scale': R(2, 1), 'l.weight_shape': i(2)}, 'mxfp4': {'e.gate_up_proj_blocks': u(1, 2, 2, 16), 'e.gate_up_proj_scales': u(1, 2, 2)},
    'HQQ': {'l.W_q': u(4, 4), 'l.scale': R(4, 1)}, 'EETQ': {'l.weight': i(4, 4).to(torch.int8), 'l.weight_scales': R(4)}, 'quanto': {'l.weight._data': u(4, 4), 'l.weight._scale': R(4)},
    'AQLM': {'l.codes': i(2, 2, 1), 'l.codebooks': R(1, 4, 1, 8)}, 'ComfyUI': {'l.weight': f8(4, 4), 'l.scale_weight': R(1), 'scaled_fp8': f8(0)},
    'float8': {'l.weight': f8(4, 4), 'l.weight_scale': R(1)}, 'no quantization_config': {'l.weight': u(4, 2), 'l.weight_scale': R(1)}, '4 bit': {'l.weight': u(8, 1), 'l.weight.absmax': R(1)}}

@pytest.mark.parametrize('what', refused)
def test_codes_without_a_key(what):
    with pytest.raises(ValueError) as e: Checkpoint(refused[what] | {'n.weight': R(4)})
    assert what in str(e.value) and 'dequantise' in str(e.value) and 'cannot be merged' in str(e.value)

@pytest.mark.parametrize('method', ['torchao','bitnet','gptq','quark','something'])
def test_methods_by_configuration(method, tmp_path):
    "Integers under a quantised configuration are codes; floats are weights, whatever it says"
    (tmp_path/'config.json').write_text(json.dumps(dict(quantization_config=dict(quant_method=method))))
    save_file({'l.weight': u(4, 4), 'p.position_ids': torch.arange(4)[None]}, tmp_path/'model.safetensors')
    with pytest.raises(ValueError, match=f'quantised .{method}'): Checkpoint(tmp_path)
    save_file({'l.weight': R(4, 4), 'p.position_ids': torch.arange(4)[None]}, tmp_path/'model.safetensors')
    assert not Checkpoint(tmp_path).dequantised

def test_plain_models_are_no_codes():
    "Names that only look like those of a quantised model"
    sd = {'q.codebook.embed': R(4, 4), 'b_blocks': R(2, 2), 'n.scales': R(3), 'x.weight_scale': R(1), 'x.weight': R(3, 3), 'v.indices': i(3), 'c.codes': i(3), 'as': f8(3, 3)}
    ck = Checkpoint(sd)
    assert set(ck)==set(sd) and not ck.dequantised and not ck.notes

def test_merge_of_fp8(tmp_path):
    "The average of what the codes stand for, from files, in forked processes too; NaN among codes is refused"
    true = []
    for j,o in enumerate('ab'):
        q,s = R(256, 256, seed=j).to(torch.float8_e4m3fn),R(2, 2, seed=9+j).abs()
        (tmp_path/o).mkdir()
        save_file({'q.weight': q, 'q.weight_scale_inv': s, 'n.weight': R(4, seed=j)}, tmp_path/o/'model.safetensors')
        (tmp_path/o/'config.json').write_text(json.dumps(dict(dtype='float32', quantization_config=fp8_config)))
        true.append(q.float()*s.repeat_interleave(128, 0).repeat_interleave(128, 1))
    p = subprocess.run([os.path.join(os.path.dirname(sys.executable), 'spectrum-merge'), 'a', 'b', '--out', 'o'], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode==0, p.stderr
    o = load_file(tmp_path/'o/model.safetensors')
    assert set(o)=={'q.weight','n.weight'} and torch.allclose(o['q.weight'], (true[0]+true[1])/2, atol=1e-6)
    q = R(256, 256).to(torch.float8_e4m3fn)
    q.view(torch.uint8)[7, 7] = 127
    save_file({'q.weight': q, 'q.weight_scale_inv': R(2, 2).abs(), 'n.weight': R(4)}, tmp_path/'b/model.safetensors')
    models = [tmp_path/'a',tmp_path/'b']
    with pytest.raises(ValueError, match='q.weight of b holds 1 NaN'): merge(make_plan('standard', models), models)

@pytest.mark.parametrize('kind', ['nf4','fp4'])
@pytest.mark.parametrize('nested', [True, False])
@pytest.mark.parametrize('dtype', ['float16','bfloat16','float32'])
def test_four_bits_are_those_of_bitsandbytes(kind, nested, dtype):
    "Bit for bit what the library itself makes of its codes, where it is installed"
    F = pytest.importorskip('bitsandbytes.functional')
    q,state = F.quantize_4bit(R(96, 80).to(getattr(torch, dtype)), quant_type=kind, compress_statistics=nested)
    sd = {'l.weight': q} | {f'l.weight.{k}': v for k,v in state.as_dict(packed=True).items()}
    assert Checkpoint(sd).read('l.weight').equal(F.dequantize_4bit(q, state))

def test_turned_weights_are_refused():
    "transformers turns the weights of GPT-2's Conv1D before it quantises them"
    sd = {f'h.0.attn.c_attn.{k}': v for k,v in nf4(R(16, 16))[0].items()}
    with pytest.raises(ValueError, match='Conv1D'): Checkpoint(sd)
    assert dequantised({k: Entry(v) for k,v in sd.items()}, dict(model_type='gpt_bigcode'))[1]
