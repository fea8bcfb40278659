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

def _state(page):
    return page.locator('.widget-image').get_attribute('src'),page.locator('.widget-html').last.inner_text()

def _moved(page, old):
    "The new text, after picture and text have changed"
    playwright().expect(page.locator('.widget-image')).not_to_have_attribute('src', old[0], timeout=30_000)
    playwright().expect(page.locator('.widget-html').last).not_to_have_text(old[1], timeout=30_000)
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
    playwright().expect(page.get_by_label('SNR of')).to_be_disabled()
    old = _state(page)
    page.get_by_label('BatchNorm').select_option('per task')
    assert 'changed no layer' in _moved(page, old)
