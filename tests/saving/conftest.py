"""A cache of remote code that the test processes do not share."""

import pytest
import transformers.dynamic_module_utils


@pytest.fixture(autouse=True, scope="session")
def code_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("remote_code"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        yield folder
