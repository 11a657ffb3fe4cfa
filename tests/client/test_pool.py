import asyncio

from steer_client import RequestCancelledError
from steer_client._pool import TaskPool


async def test_work_that_others_cancel_is_not_waited_for_for_ever():
    pool = TaskPool()
    before = asyncio.all_tasks()
    pool.start(7, asyncio.sleep(60))
    await asyncio.sleep(0)
    (task,) = asyncio.all_tasks() - before
    task.cancel()
    outcome = await asyncio.wait_for(pool.next(), 5)
    assert outcome.key == 7
    assert isinstance(outcome.error, RequestCancelledError)
