"""
The same without users: every conversation has its own accounts.

All in one file, which the server loads twice, once for the graph and once for the app.
"""

from accounts import acme
from agent import list_issues, model
from fastapi import FastAPI
from langchain.agents import create_agent

from langchain_pocket_auth import PocketAuth, by_thread

pocket = PocketAuth(providers=[acme], owner=by_thread)

agent = create_agent(model, [list_issues], middleware=[pocket.middleware()])

app = FastAPI()
app.include_router(pocket.router)
