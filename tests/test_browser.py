"The panel in a real browser: `spectrum-explore` serves it, Chromium moves the controls."
import pytest
from pages import explored, opened, playwright
from test_explore import make_merges, write_results

@pytest.fixture(scope='module')
def page(browser, tmp_path_factory):
    "The page of a folder of results"
    d = tmp_path_factory.mktemp('explore')
    with explored(d, write_results(d/'results', *make_merges())) as url:
        page = opened(browser, url, viewport=dict(width=1100, height=900))
        page.locator('.noUi-handle').wait_for(timeout=120_000)
        page.locator('.widget-image').wait_for()
        yield page

def _state(page): return page.locator('.widget-image').get_attribute('src'),page.locator('.widget-html').last.text_content()

def _moved(page, old, *words):
    "Wait until picture and text are others than in `old`, and the text says what it is to"
    expect,text = playwright().expect,page.locator('.widget-html').last
    expect(page.locator('.widget-image')).not_to_have_attribute('src', old[0], timeout=30_000)
    expect(text).not_to_have_text(old[1], timeout=30_000)
    for o in words: expect(text).to_contain_text(o, timeout=30_000)

def test_slider(page):
    playwright().expect(page.locator('.widget-html').last).to_contain_text('Accuracy: big cats')
    old = _state(page)
    page.locator('.noUi-handle').press('ArrowRight')
    _moved(page, old, 'layers are above SNR', 'Changed by the last step')
    assert page.locator('.widget-readout').inner_text()=='75 %'

def test_strategy(page):
    old = _state(page)
    page.get_by_label('strategy').select_option('base_reset')
    _moved(page, old, 'mean relative to the experts')

def test_weights(page):
    old = _state(page)
    page.get_by_label('SNR of').select_option('weights')
    _moved(page, old, 'Changed by the last step')

def test_not_measured(page):
    old = _state(page)
    page.get_by_label('strategy').select_option('snr_weighted')
    _moved(page, old, 'not measured')

def test_batchnorm_and_disabled_controls(page):
    old = _state(page)
    page.get_by_label('strategy').select_option('standard')
    _moved(page, old, 'Changed by the last step')
    playwright().expect(page.get_by_label('SNR of')).to_be_disabled()
    old = _state(page)
    page.get_by_label('BatchNorm').select_option('per task')
    _moved(page, old, 'changed no layer')
