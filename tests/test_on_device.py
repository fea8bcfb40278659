"Measured by torch, on its processor and on a GPU where there is one: the same decisions as without."
import subprocess, sys
from functools import partial
import numpy as np, pytest, torch
from safetensors.torch import save_file
from spectrum_merging import edges, on_device
from spectrum_merging.cli import scan_cli
from spectrum_merging.on_device import OnDevice, device_named, full_precision
from spectrum_merging.rules import recipe
from spectrum_merging.scan import scan
from spectrum_merging.spectrum import matrix

devices = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'))]

def made(m, n, kind, k, seed):
    "Noise of a kind, and some directions"
    rng = np.random.default_rng(seed)
    W = rng.standard_t(4, (m, n)) if kind=='heavy' else rng.standard_normal((m, n))
    if kind=='rows': W *= np.exp(.5*rng.standard_normal((m, 1)))
    if kind=='mean': W += 50
    u,v = (np.linalg.qr(rng.standard_normal((o, max(k, 1))))[0][:,:k] for o in (m, n))
    return W+(u*np.linspace(1.5, 4, k)*(m*n)**.25*4)@v.T if k else W

def both(W, estimator, device):
    "What is said here and there"
    M = matrix(W)
    M.on = partial(OnDevice, device=device_named(device))
    what = recipe(estimator, 'estimator')
    return what(M=matrix(W), name='W'),what(M=M, name='W')

def same(here, there):
    assert (here.n_spikes, here.fits, here.m, here.n)==(there.n_spikes, there.fits, there.m, there.n)
    # an edge that was drawn is a few steps of Lanczos' method off, on either side
    for k,rel in dict(edge=5e-3, snr=1e-2, norm=1e-5, sigma=1e-2, effective_rank=1e-4, stable_rank=1e-4).items():
        assert getattr(there, k)==pytest.approx(getattr(here, k), rel=rel, abs=1e-12), k

@pytest.mark.parametrize('device', devices)
@pytest.mark.parametrize('estimator', ['flip','mp'])
@pytest.mark.parametrize('dtype', ['f4','f8'])
@pytest.mark.parametrize('m,n', [(48, 48),(40, 150),(150, 40),(96, 320)])
@pytest.mark.parametrize('kind,k', [('plain', 0),('plain', 3),('rows', 2),('heavy', 1),('mean', 2)])
def test_same_spectrum(m, n, kind, k, dtype, estimator, device): same(*both(made(m, n, kind, k, m+n).astype(dtype), estimator, device))

@pytest.mark.parametrize('device', devices)
@pytest.mark.parametrize('scale', [1e-160, 1e-30, 1e25, 1e160])
def test_units(scale, device):
    "Squares of the entries, or their squares, are no numbers of the type"
    kinds = ['f8'] if not 1e-38<scale<1e38 else ['f4','f8']
    for kind in kinds:
        here,there = both((made(30, 70, 'plain', 2, 1)*scale).astype(kind), 'flip', device)
        assert here.n_spikes==there.n_spikes and there.snr==pytest.approx(here.snr, rel=1e-2)

@pytest.mark.parametrize('device', devices)
@pytest.mark.parametrize('W', [np.full((20, 30), 3.), np.zeros((20, 30)), np.outer(np.arange(1., 21), np.ones(30))])
def test_no_noise(W, device):
    here,there = both(W, 'flip', device)
    assert (here.n_spikes, here.snr)==(there.n_spikes, pytest.approx(there.snr))

@pytest.mark.parametrize('device', devices)
def test_not_finite(device):
    W = made(20, 30, 'plain', 0, 0)
    W[3,4],W[5,6] = np.nan,np.inf
    with pytest.raises(ValueError, match='1 NaN and 1 Inf'): both(W, 'flip', device)

@pytest.mark.parametrize('device', devices)
def test_large_way(monkeypatch, device):
    "The signs of large matrices, which are computed there, in several windows and groups"
    W = made(60, 200, 'rows', 2, 5)
    for room in edges,on_device: monkeypatch.setattr(room, 'IN_MEMORY', 1)
    monkeypatch.setattr(on_device, '_window', 60*33)
    monkeypatch.setattr(on_device, '_together', 60*200*2)
    same(*both(W, 'flip', device))

@pytest.mark.parametrize('device', devices)
def test_scan(tmp_path, device):
    "Updates in bf16, from files"
    def models(seed): return {f'block.{i}.weight': torch.from_numpy(made(48, 80, 'rows', i%3, seed+i)).bfloat16() for i in range(4)}
    base,add = models(0),models(10)
    model = {k: (v+.1*add[k]).bfloat16() for k,v in base.items()}
    for k,o in dict(base=base, model=model).items(): save_file(o, tmp_path/f'{k}.safetensors')
    files = tmp_path/'model.safetensors',tmp_path/'base.safetensors'
    here,there = (scan(*files, progress=False, device=d) for d in (None, device))
    assert here.n_spikes.sum()>0 and list(here)==list(there)
    assert (here[['name','n_spikes','fits']]==there[['name','n_spikes','fits']]).all(axis=None)
    assert np.allclose(here.snr, there.snr, rtol=1e-2)
    scan_cli(str(files[0]), str(files[1]), device=device, out=str(tmp_path/'scan.csv'))
    assert len((tmp_path/'scan.csv').read_text().splitlines())==5

def test_refused_before_any_work(tmp_path):
    for odd,said in {'gpu': "write 'cuda'", 'cuda:77': 'CUDA device', 'meta': 'fp64'}.items():
        with pytest.raises(ValueError, match=said): scan(tmp_path/'not there', device=odd)

def test_precision_comes_back():
    torch.set_float32_matmul_precision('medium')
    try:
        with pytest.raises(ZeroDivisionError), full_precision():
            assert torch.get_float32_matmul_precision()=='highest'
            1/0
        assert torch.get_float32_matmul_precision()=='medium'
    finally: torch.set_float32_matmul_precision('highest')

def test_without_torch(tmp_path):
    "Named with its remedy; and nothing asks for torch where no device is named"
    save_file({'a.weight': torch.from_numpy(made(20, 30, 'plain', 1, 0))}, tmp_path/'m.safetensors')
    code = '''import sys; sys.modules['torch'] = None
from spectrum_merging.cli import scan_cli
sys.exit(scan_cli())'''
    args = [sys.executable, '-c', code, tmp_path/'m.safetensors', '--out', tmp_path/'o.csv']
    def ran(*more): return subprocess.run([*args, *more], capture_output=True, text=True)
    assert (p := ran('--device', 'cuda')).returncode==1 and 'spectrum-merging[torch]' in p.stderr and not (tmp_path/'o.csv').exists()
    assert ran().returncode==0 and (tmp_path/'o.csv').exists()

def test_rules_that_stay_on_the_processor():
    with pytest.raises(ValueError, match="'cpu', and biwhiten measures on the processor: leave device out, or choose mp or flip"):
        scan({'w': np.eye(9)}, estimator='biwhiten', device='cpu', progress=False)
