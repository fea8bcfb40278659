"What the tests that look at pages in Chromium share: the browser, a served page, what Chromium may ask for."
import os, re, shutil, signal, socket, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
import pytest

root = Path(__file__).parent.parent
command = 'import sys; from spectrum_merging.cli import explore_cli; sys.exit(explore_cli())'

def lacking(what, remedy):
    "Leave the test out; where CI is set it fails instead, since nobody would see that it was left out"
    (pytest.fail if os.environ.get('CI') else pytest.skip)(f'no {what}: {remedy}')

def playwright():
    "Playwright's API, where what the pages need is installed"
    try:
        import voila
        from playwright import sync_api
    except ImportError as e: lacking(e.name, "pip install 'spectrum-merging[dev]'")
    return sync_api

def chromium(pw):
    "Debian's Chromium, or the one that `playwright install chromium` fetched"
    own = pw.chromium.executable_path
    found = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome') or (own if os.path.exists(own) else None)
    return found or lacking('Chromium', 'apt-get install chromium')

@contextmanager
def explored(folder, *args):
    "Address of the page that `spectrum-explore` serves, started in a folder"
    (folder/'spectrum-explore').write_text(command)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    cmd,log = [sys.executable, 'spectrum-explore', *map(str, args), '--no-browser', '--port', str(port)],folder/'log'
    with log.open('w') as f:
        p = subprocess.Popen(cmd, cwd=folder, stdout=f, stderr=f, start_new_session=True,
            env=os.environ | dict(PYTHONPATH=str(root), SPECTRUM_CACHE=str(folder/'cache')))
    try:
        for _ in range(600):
            if 'is running at' in log.read_text() or p.poll() is not None: break
            time.sleep(.2)
        assert p.poll() is None, log.read_text()
        yield re.search(r'http://127\S+token=\S+', log.read_text())[0]
    finally:
        os.killpg(p.pid, signal.SIGTERM)
        p.wait(20)

def opened(browser, url, within=None, **how):
    "A page, which may ask for nothing but what lies beneath an address, by default its own"
    page,within = browser.new_page(**how),within or url.partition('?')[0]
    page.route('**/*', lambda r: r.continue_() if r.request.url.startswith(within) else r.abort())
    page.goto(url, timeout=120_000)
    return page
