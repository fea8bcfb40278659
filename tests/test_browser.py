"The panel in a real browser: `spectrum-explore` serves it, Chromium moves the controls. Run with `pytest -m browser`."
import os, re, shutil, socket, subprocess, sys, time
from pathlib import Path
import pytest

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip('playwright.sync_api')
pytest.importorskip('voila')
root = Path(__file__).parent.parent
command = 'import sys; from spectrum_merging.cli import explore_cli; sys.exit(explore_cli())'

def _free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(scope='module')
def url(tmp_path_factory):
    "Address of the page that `spectrum-explore` serves for a folder of results"
    from test_explore import make_merges, write_results
    d = tmp_path_factory.mktemp('explore')
    folder,log = write_results(d/'results', *make_merges()),d/'log'
    (d/'spectrum-explore').write_text(command)
    cmd = [sys.executable, d/'spectrum-explore', folder, '--no-browser', '--port', str(_free_port())]
    with log.open('w') as f:
        p = subprocess.Popen(cmd, cwd=d, stdout=f, stderr=f, env=os.environ|dict(PYTHONPATH=str(root)))
    try:
        for _ in range(300):
            if 'is running at' in log.read_text() or p.poll() is not None: break
            time.sleep(.2)
        assert p.poll() is None, log.read_text()
        yield re.search(r'http://127\S+token=\S+', log.read_text())[0]
    finally:
        p.terminate()
        p.wait(20)

@pytest.fixture(scope='module')
def page(url):
    chrome = shutil.which('chromium') or pytest.skip('no Chromium')
    with sync_api.sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=chrome, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=1100, height=900))
        page.route('**/*', lambda r: r.continue_() if r.request.url.startswith(url.partition('?')[0]) else r.abort())
        page.goto(url, timeout=120_000)
        page.locator('.noUi-handle').wait_for(timeout=120_000)
        page.locator('.widget-image').wait_for()
        yield page
        browser.close()

def _state(page):
    return page.locator('.widget-image').get_attribute('src'),page.locator('.widget-html').last.inner_text()

def _moved(page, old):
    "The new text, after picture and text have changed"
    sync_api.expect(page.locator('.widget-image')).not_to_have_attribute('src', old[0], timeout=30_000)
    sync_api.expect(page.locator('.widget-html').last).not_to_have_text(old[1], timeout=30_000)
    return _state(page)[1]

def test_slider(page):
    old = _state(page)
    assert 'Accuracy: big cats' in old[1]
    handle = page.locator('.noUi-handle')
    handle.focus()
    handle.press('ArrowRight')
    new = _moved(page, old)
    assert 'layers are above SNR' in new and 'Changed by the last step' in new
    assert page.locator('.widget-readout').inner_text()=='75 %'

def test_strategy(page):
    old = _state(page)
    page.get_by_label('strategy').select_option('base_reset')
    assert 'mean relative to the experts' in _moved(page, old)

def test_weights(page):
    old = _state(page)
    page.get_by_label('SNR of').select_option('weights')
    assert 'Changed by the last step' in _moved(page, old)

def test_not_measured(page):
    old = _state(page)
    page.get_by_label('strategy').select_option('snr_weighted')
    assert 'not measured' in _moved(page, old)

def test_batchnorm_and_disabled_controls(page):
    old = _state(page)
    page.get_by_label('strategy').select_option('standard')
    old = old[0],_moved(page, old)
    sync_api.expect(page.get_by_label('SNR of')).to_be_disabled()
    old = _state(page)
    page.get_by_label('BatchNorm').select_option('per task')
    assert 'changed no layer' in _moved(page, old)
