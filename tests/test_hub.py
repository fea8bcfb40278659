"Publishing, against a server on this machine that answers as the hub does: what arrives, what stays here, what is refused."
import base64, json, os, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest, torch
from safetensors.torch import load, save_file
from spectrum_merging.extract import extract
from spectrum_merging.hub import publishable
from spectrum_merging.merge import merge
from spectrum_merging.plan import make_plan

class Hub(BaseHTTPRequestHandler):
    "Remembers what it is sent; `broken` is the path that it refuses"
    def log_message(self, *args): pass
    def answer(self, what, status=200):
        data = json.dumps(what).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def body(self): return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    def do_GET(self):
        ok = self.headers.get('Authorization')=='Bearer hf_key'
        self.answer(dict(name='me', type='user', orgs=[]) if ok else dict(error='Invalid user token.'), 200 if ok else 401)
    def do_PUT(self):
        self.server.stored[self.path.rpartition('/')[2]] = self.body()
        self.answer({})
    def do_POST(self):
        at,data,s = f'http://127.0.0.1:{self.server.server_port}',self.body(),self.server
        s.asked.append(self.path)
        if s.broken and s.broken in self.path: return self.answer(dict(error='disk full'), 507)
        if self.path.endswith('/repos/create'):
            s.made = json.loads(data)
            return self.answer(dict(url=f'{at}/me/merged'))
        if 'validate-yaml' in self.path: return self.answer(dict(errors=[], warnings=[]))
        if '/preupload/' in self.path: return self.answer(dict(files=[dict(path=o['path'], shouldIgnore=False,
            uploadMode='lfs' if o['path'].endswith('.safetensors') else 'regular') for o in json.loads(data)['files']]))
        if self.path.endswith('/batch'): return self.answer(dict(transfer='basic', objects=[o | dict(actions=dict(upload=dict(href=f'{at}/put/{o["oid"]}', header={})))
            for o in json.loads(data)['objects']]))
        for o in map(json.loads, data.decode().splitlines()):
            if o['key']=='file': s.files[o['value']['path']] = base64.b64decode(o['value']['content'])
            if o['key']=='lfsFile': s.files[o['value']['path']] = s.stored[o['value']['oid']]
        self.answer(dict(commitUrl=f'{at}/me/merged/commit/'+'a'*40, commitOid='a'*40, success=True))

@pytest.fixture
def hub():
    s = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    s.asked,s.stored,s.files,s.made,s.broken = [],{},{},None,''
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()

def tensors(seed):
    g = torch.Generator().manual_seed(seed)
    return {'layer.weight': torch.randn(24, 32, generator=g), 'layer.bias': torch.randn(24, generator=g)}

@pytest.fixture
def d(tmp_path):
    base = tensors(0)
    for i,k in enumerate(('base','a','b')): save_file(base | {'layer.weight': base['layer.weight']+.1*i*torch.ones(24, 32)}, tmp_path/f'{k}.safetensors')
    return tmp_path

def push(hub, code, d, key='hf_key'):
    "Python with that hub, in its own process: the hub's library reads the address when it is imported"
    env = os.environ | dict(HF_ENDPOINT=f'http://127.0.0.1:{hub.server_port}', HF_HUB_DISABLE_XET='1', HF_TOKEN=key, HF_HOME=str(d/'hf'), HF_HUB_DISABLE_PROGRESS_BARS='1',
        PYTHONPATH=str(Path(__file__).parent.parent))
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=d, env=env)

def command(*words): return f"import sys; from spectrum_merging.cli import merge_cli; sys.argv = ['spectrum-merge', *{words!r}]; merge_cli()"
models = 'a=a.safetensors','b=b.safetensors','--base','base.safetensors'

def test_merge_and_push(hub, d):
    "All files of the folder arrive, byte by byte; the repository is private; what can be read in it is said"
    p = push(hub, command(*models, '--out', 'out', '--push-to-hub', 'me/merged'), d)
    assert p.returncode==0 and 'published at http' in p.stdout, p.stderr
    assert f'merge.json names {d}' in p.stdout and 'can read that' in p.stdout
    here = {o.relative_to(d/'out').as_posix(): o.read_bytes() for o in (d/'out').rglob('*') if o.is_file()}
    assert hub.files==here and {'merge.json','model.safetensors','plan.csv','README.md'} <= set(here)
    assert hub.made['name']=='merged' and (hub.made.get('private') is True or hub.made.get('visibility')=='private')
    assert load(hub.files['model.safetensors'])['layer.weight'].shape==(24, 32)

def test_adapter(hub, d):
    extract(d/'b.safetensors', d/'base.safetensors', d/'adapter')
    p = push(hub, "from spectrum_merging.hub import push_to_hub; push_to_hub('adapter', 'me/merged', private=False)", d)
    assert p.returncode==0, p.stderr
    assert set(hub.files)=={o.name for o in (d/'adapter').iterdir()} and not hub.made.get('private')

@pytest.mark.parametrize('repo, key, status, says', [('merged', 'hf_key', 2, 'names no owner'), ('a/b/c', 'hf_key', 2, 'a/b/c'), ('me/merged', 'other', 1, 'does not know you')])
def test_refused_before_work(hub, d, repo, key, status, says):
    p = push(hub, command(*models, '--out', 'out', '--push-to-hub', repo), d, key)
    assert p.returncode==status and says in p.stderr and len(p.stderr.strip().splitlines())==1, p.stderr
    assert not (d/'out').exists() and not hub.files and 'hf_key' not in p.stderr+p.stdout

@pytest.mark.parametrize('broken', ['/repos/create','/batch','/commit/'])
def test_server_fails(hub, d, broken):
    "The merge stays, and how to go on is said"
    hub.broken = broken
    p = push(hub, command(*models, '--out', 'out', '--push-to-hub', 'me/merged'), d)
    assert p.returncode==1 and 'did not take it' in p.stderr and "push_to_hub('out', 'me/merged') tries again" in p.stderr, p.stderr
    assert (d/'out/merge.json').is_file() and 'Traceback' not in p.stderr and not hub.files

def _merged(d):
    ms = {k: str(d/f'{k}.safetensors') for k in 'ab'}
    merge(make_plan('standard', ms), ms, out=d/'out')
    return d/'out'

@pytest.mark.parametrize('harm, says', [
    (lambda o: (o/'key.json').write_text('secret'), 'key.json is no file of the merge'),
    (lambda o: (o/'.env').write_text('secret'), 'hidden or a link'),
    (lambda o: (o/'README2.md').symlink_to('/etc/passwd'), 'hidden or a link'),
    (lambda o: (o/'plan.csv').write_text('other'), 'plan.csv was changed'),
    (lambda o: (o/'model.safetensors').unlink(), 'model.safetensors is missing'),
    (lambda o: (o/'model.safetensors').write_bytes(b'short'), 'model.safetensors was changed'),
    (lambda o: (o/'merge.json').write_text('{}'), 'merge.json was changed'),
    (lambda o: (o/'merge.json').unlink(), 'is no result')])
def test_what_is_not_published(d, harm, says):
    harm(_merged(d))
    with pytest.raises(ValueError, match=says): publishable(d/'out')

def test_card_may_be_edited(d):
    out = _merged(d)
    (out/'README.md').write_text('# Mine')
    assert 'README.md' in publishable(out)[0] and publishable(out)[1]==[str(d/'a.safetensors'), str(d/'b.safetensors')]
    with pytest.raises(FileNotFoundError): publishable(d/'nowhere')
