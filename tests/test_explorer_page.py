"The explorer in a real browser: `spectrum-explore A B --base BASE` serves it, Chromium moves the controls, and what is shown is what `make_plan` returns."
import os, re, shutil, signal, socket, subprocess, sys, time
from html import unescape
from pathlib import Path
import pytest
from safetensors.torch import save_file
from spectrum_merging.plan import Plan, make_plan
from spectrum_merging.shown import shown_value
from test_explorer import make_models

sync_api = pytest.importorskip('playwright.sync_api', reason="playwright is not installed: pip install 'spectrum-merging[dev]'")
pytest.importorskip('voila', reason="voila is not installed: pip install 'spectrum-merging[dev]'")
root = Path(__file__).parent.parent
command = 'import sys; from spectrum_merging.cli import explore_cli; sys.exit(explore_cli())'

def chromium(pw):
    "Debian's Chromium, or the one that `playwright install chromium` fetched"
    own = pw.chromium.executable_path
    found = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome') or (own if os.path.exists(own) else None)
    return found or pytest.skip('no Chromium: apt-get install chromium')

@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as pw:
        found = pw.chromium.launch(executable_path=chromium(pw), args=['--no-sandbox'])
        yield found
        found.close()

@pytest.fixture(scope='module')
def served(browser, tmp_path_factory):
    "Address of the page, the folder, and the models as they lie in it"
    d = tmp_path_factory.mktemp('page')
    models,base = make_models()
    for k,o in (models | dict(base=base)).items(): save_file(o, d/f'{k}.safetensors')
    (d/'spectrum-explore').write_text(command)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    cmd = [sys.executable, 'spectrum-explore', *(f'{m}={m}.safetensors' for m in models), '--base', 'base.safetensors', '--out', 'saved',
        '--no-browser', '--port', str(port)]
    log = d/'log'
    with log.open('w') as f:
        p = subprocess.Popen(cmd, cwd=d, stdout=f, stderr=f, start_new_session=True,
            env=os.environ | dict(PYTHONPATH=str(root), SPECTRUM_CACHE=str(d/'cache')))
    try:
        for _ in range(600):
            if 'is running at' in log.read_text() or p.poll() is not None: break
            time.sleep(.2)
        assert p.poll() is None, log.read_text()
        yield re.search(r'http://127\S+token=\S+', log.read_text())[0],d,({m: d/f'{m}.safetensors' for m in models}, d/'base.safetensors')
    finally:
        os.killpg(p.pid, signal.SIGTERM)
        p.wait(20)

@pytest.fixture(scope='module')
def page(browser, served):
    "The page, which may ask for nothing but what the server has"
    url = served[0]
    page = browser.new_page(viewport=dict(width=1100, height=1400))
    page.route('**/*', lambda r: r.continue_() if r.request.url.startswith(url.partition('?')[0]) else r.abort())
    page.goto(url, timeout=120_000)
    page.locator('table').wait_for(timeout=120_000)
    return page

def shows(page, plan):
    "Whether the page's table and digest come to be those of a plan; the last column says what the last step changed"
    cells = [list(plan.table), *([unescape(shown_value(v)) for v in o] for o in plan.table.itertuples(index=False))]
    for _ in range(150):
        read = page.evaluate("[...document.querySelectorAll('table tr')].map(r => [...r.cells].slice(0, -1).map(c => c.textContent))")
        if read==cells and plan.digest in page.locator('.widget-html').first.inner_text(): return
        time.sleep(.2)
    assert read==cells and plan.digest in page.locator('.widget-html').first.inner_text()

def pictures(page): return page.evaluate("[...document.querySelectorAll('svg[role=img]')].map(o => o.outerHTML)")

def redrawn(page, i, old):
    "Wait until picture `i` is another one"
    for _ in range(150):
        if len(now := pictures(page))==2 and now[i]!=old: return
        time.sleep(.2)
    assert False, 'the picture stays'

def press(page, what, *keys):
    "Move the slider that is called `what`"
    handle = page.locator('.widget-slider', has_text=what).locator('.noUi-handle')
    handle.focus()
    for k in keys: handle.press(k)
    return float(page.locator('.widget-slider', has_text=what).locator('.widget-readout').inner_text())

def test_explorer_page(page, served):
    "Threshold, strategy, estimator, layer, and the plan saved"
    _,d,(models, base) = served
    shows(page, make_plan('snr_winner', models, base, top=50))
    page.get_by_label('cut by').select_option('threshold')
    sync_api.expect(page.locator('.widget-slider', has_text='threshold')).to_be_visible()
    before = pictures(page)
    value = press(page, 'threshold', *['ArrowRight']*3)
    redrawn(page, 0, before[0])
    shows(page, make_plan('snr_winner', models, base, threshold=value))
    page.get_by_label('strategy').select_option('snr_max')
    shows(page, make_plan('snr_max', models, base, threshold=value))
    sync_api.expect(page.locator('.widget-html').first).to_contain_text('Changed by the last step')
    page.get_by_label('estimator').select_option('mp')
    plan = make_plan('snr_max', models, base, threshold=value, estimator='mp')
    shows(page, plan)
    before = pictures(page)
    layers = page.get_by_label('layer').locator('option').all_text_contents()
    page.get_by_label('layer').select_option(next(o for o in layers if o!=page.get_by_label('layer').input_value()))
    redrawn(page, 1, before[1])
    assert pictures(page)[0]==before[0] # the plan is the same
    page.get_by_role('button', name='save plan').click()
    sync_api.expect(page.get_by_text('saved /')).to_be_visible(timeout=30_000)
    saved = Plan.load(d/'saved'/f'plan-{plan.digest}.csv')
    assert saved.digest==plan.digest and saved.meta==plan.meta
    assert saved.table.astype(str).equals(plan.table.astype(str))
    line = page.locator('pre').last.inner_text()
    assert line.startswith('spectrum-merge cats=') and f'--threshold={value}' in line

def test_refusal_on_the_page(page, served):
    "A setting that is out of range is said, and nothing is shown in its place"
    _,_,(models, base) = served
    page.get_by_label('strategy').select_option('ties')
    shows(page, make_plan('ties', models, base))
    box = page.get_by_label('settings')
    box.fill('density=7')
    box.press('Enter')
    sync_api.expect(page.locator('.widget-html').first).to_contain_text('density', timeout=30_000)
    sync_api.expect(page.locator('table')).to_have_count(0)
    box.fill('density=0.3')
    box.press('Enter')
    page.locator('table').wait_for(timeout=30_000)
    shows(page, make_plan('ties(density=0.3)', models, base))

def test_width_of_a_phone(page):
    "Nothing is wider than the page"
    page.set_viewport_size(dict(width=400, height=900))
    wide = page.evaluate('document.documentElement.scrollWidth')
    page.set_viewport_size(dict(width=1100, height=1400))
    assert wide<=400
