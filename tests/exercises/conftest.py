"""What is not written yet is skipped; `-k yours` fails if nothing is. A solution is no hand-in."""
import exercises
import pytest

WRITTEN = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        result = yield
    except NotImplementedError as error:
        if error.args != (exercises.TODO,):
            raise
        pytest.skip(exercises.TODO)
    if "yours" in item.name:
        item.config.stash[WRITTEN] = True
    return result


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if exitstatus == 0 and "yours" in config.option.keyword and not config.stash.get(
            WRITTEN, False) and session.testscollected:
        session.exitstatus = 1
        config.get_terminal_writer().line("\nno exercise is written yet: see exercises.py")
