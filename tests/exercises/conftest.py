"""What is not written yet is skipped."""
import exercises
import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except NotImplementedError as error:
        if error.args != (exercises.TODO,):
            raise
        pytest.skip(exercises.TODO)
