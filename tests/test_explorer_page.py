"The explorer in a real browser: `spectrum-explore A B --base BASE` serves it, Chromium moves the controls, and what is shown is what `make_plan` returns."
import time
from html import unescape
import pytest
from safetensors.torch import save_file
from pages import explored, opened, playwright
from spectrum_merging.edges import measure
from spectrum_merging.plan import Plan, make_plan
from spectrum_merging.shown import shown_value
from test_explorer import make_models

@pytest.fixture(scope='module')
def served(browser, tmp_path_factory):
    "Address of the page, the folder, and the models as they lie in it"
    d = tmp_path_factory.mktemp('page')
    models,base = make_models()
    for k,o in (models | dict(base=base)).items(): save_file(o, d/f'{k}.safetensors')
    with explored(d, *(f'{m}={m}.safetensors' for m in models), '--base', 'base.safetensors', '--out', 'saved') as url:
        yield url,d,({m: d/f'{m}.safetensors' for m in models}, d/'base.safetensors')

@pytest.fixture(scope='module')
def page(browser, served):
    page = opened(browser, served[0], viewport=dict(width=1100, height=1400))
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
    "Move the slider that is called `what`, each key after the layers' cut is what the one before it left; the value it comes to"
    slider,expect = page.locator('.widget-slider', has_text=what),playwright().expect
    handle,readout = slider.locator('.noUi-handle'),slider.locator('.widget-readout')
    for k in keys:
        shown = readout.inner_text()
        handle.press(k)
        try: expect(readout).not_to_have_text(shown, timeout=15_000)
        except AssertionError: # a busy page has lost a key: whoever sees that presses again
            handle.press(k)
            expect(readout).not_to_have_text(shown, timeout=30_000)
        drawn(page, float(readout.inner_text()))
    return float(readout.inner_text())

def drawn(page, cut):
    "Wait until the layers are drawn with a cut"
    playwright().expect(page.locator('svg[role=img]').first).to_contain_text(f'cut {cut:.3g}', timeout=30_000)

def test_explorer_page(page, served):
    "Threshold, strategy, estimator, layer, and the plan saved"
    _,d,(models, base) = served
    expect,plans = playwright().expect,[]
    def becomes(strategy, **how):
        "The page shows that plan, which is none of those before"
        plans.append(make_plan(strategy, models, base, **how))
        shows(page, plans[-1])
        assert f"cut {plans[-1].meta['cut']:.3g}" in pictures(page)[0]
    becomes('snr_winner', top=50)
    page.get_by_label('cut by').select_option('threshold')
    expect(page.locator('.widget-slider', has_text='threshold')).to_be_visible()
    before = pictures(page)
    value = press(page, 'threshold', *['ArrowLeft']*5) # two layers more are above it
    redrawn(page, 0, before[0])
    becomes('snr_winner', threshold=value)
    page.get_by_label('strategy').select_option('snr_max')
    becomes('snr_max', threshold=value)
    expect(page.locator('.widget-html').first).to_contain_text('Changed by the last step')
    page.get_by_label('estimator').select_option('biwhiten') # whose SNRs are all below
    becomes('snr_max', threshold=value, estimator='biwhiten')
    assert len({o.digest for o in plans})==4
    before,shown = pictures(page),page.get_by_label('layer').input_value()
    layer = next(o for o in page.get_by_label('layer').locator('option').all_text_contents() if o!=shown)
    page.get_by_label('layer').select_option(layer)
    redrawn(page, 1, before[1])
    plan,(drawn, spectra) = plans[-1],pictures(page)
    assert drawn==before[0] and f'<title>{layer}</title>' in spectra
    made,own = make_models()
    for of,less in dict(weights=0, update=own[layer]).items():
        assert f'{of}, SNR: '+', '.join(f"{k} {measure(o[layer]-less, 'biwhiten')['snr']:.3g}" for k,o in made.items()) in spectra
    page.get_by_role('button', name='save plan').click()
    expect(page.get_by_text('saved /')).to_be_visible(timeout=30_000)
    saved = Plan.load(d/'saved'/f'plan-{plan.digest}.csv')
    assert saved.digest==plan.digest and saved.meta==plan.meta
    assert saved.table.astype(str).equals(plan.table.astype(str))
    line = page.locator('pre').last.inner_text()
    assert line.startswith('spectrum-merge cats=') and f'--threshold={value}' in line

def test_refusal_on_the_page(page, served):
    "A setting that is out of range is said, and nothing is shown in its place"
    _,_,(models, base) = served
    expect = playwright().expect
    page.get_by_label('strategy').select_option('ties')
    shows(page, make_plan('ties', models, base))
    box = page.get_by_label('settings')
    box.fill('density=7')
    box.press('Enter')
    expect(page.locator('.widget-html').first).to_contain_text('density', timeout=30_000)
    expect(page.locator('table')).to_have_count(0)
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
