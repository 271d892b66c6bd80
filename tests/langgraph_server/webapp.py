from accounts import pocket
from fastapi import FastAPI
from langgraph_sdk import get_client

app = FastAPI()
app.include_router(pocket.router)  # connect pages and callbacks
pocket.auto_resume(get_client())  # paused runs go on by themselves
