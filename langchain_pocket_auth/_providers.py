"""Ids of providers, as a type. The facts are in the catalog."""

from __future__ import annotations

import re
from enum import Enum

from ._errors import ConfigurationError

_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_own_ids: set[str] = set()

# Other names of bundled providers; a test compares them with the catalog.
ALIASES = {
    "entra": "microsoft",
    "intuit": "quickbooks",
    "lark": "feishu",
    "msteams": "microsoft",
    "onedrive": "microsoft",
    "outlook": "microsoft",
    "sendgird": "sendgrid",
    "sharepoint": "microsoft",
    "twitter": "x",
}


class AuthProvider(str, Enum):  # noqa: UP042 - the spec's; str() is the id
    """
    A provider by id. Plain strings are accepted wherever one of these is.

    The members are the bundled providers; ids of own providers become members
    when their `Provider` or handler is made.
    """

    ACTIVELOOP = "activeloop"
    ADOBE = "adobe"
    AFFINITY = "affinity"
    AGENTQL = "agentql"
    AHREFS = "ahrefs"
    AIRCALL = "aircall"
    AIRTABLE = "airtable"
    ALCHEMY = "alchemy"
    ALGOLIA = "algolia"
    ALTOVIZ = "altoviz"
    AMAZON = "amazon"
    ANTHROPIC = "anthropic"
    APIFY = "apify"
    APITOKEN = "apitoken"
    APOLLO = "apollo"
    APPLE = "apple"
    ASANA = "asana"
    ATLASSIAN = "atlassian"
    ATTIO = "attio"
    AUTH0 = "auth0"
    AWS = "aws"
    AZURE_AI_SEARCH = "azure_ai_search"
    AZURE_DEVOPS = "azure_devops"
    AZURE_OPENAI = "azure_openai"
    BAMBOOHR = "bamboohr"
    BASECAMP = "basecamp"
    BASICAUTH = "basicauth"
    BIGCOMMERCE = "bigcommerce"
    BITBUCKET = "bitbucket"
    BITLY = "bitly"
    BITWARDEN = "bitwarden"
    BOX = "box"
    BRAVE_SEARCH = "brave_search"
    BREVO = "brevo"
    BREX = "brex"
    BUFFER = "buffer"
    CAL = "cal"
    CALENDLY = "calendly"
    CANVA = "canva"
    CANVAS = "canvas"
    CHROMA = "chroma"
    CLICKUP = "clickup"
    CLOCKIFY = "clockify"
    CLOSE = "close"
    CLOUDFLARE = "cloudflare"
    CODA = "coda"
    COGNITO = "cognito"
    COHERE = "cohere"
    COINBASE = "coinbase"
    CONFLUENCE = "confluence"
    CONSTANT_CONTACT = "constant_contact"
    CONTENTFUL = "contentful"
    COPPER = "copper"
    DAILYBOT = "dailybot"
    DATABRICKS = "databricks"
    DATADOG = "datadog"
    DEEL = "deel"
    DEEPSEEK = "deepseek"
    DIALPAD = "dialpad"
    DIGITALOCEAN = "digitalocean"
    DINGTALK = "dingtalk"
    DISCORD = "discord"
    DISCORDBOT = "discordbot"
    DOCUSIGN = "docusign"
    DROPBOX = "dropbox"
    EBAY = "ebay"
    ELEVENLABS = "elevenlabs"
    ETSY = "etsy"
    EVENTBRITE = "eventbrite"
    EVERNOTE = "evernote"
    EXA = "exa"
    FACEBOOK = "facebook"
    FAL = "fal"
    FEISHU = "feishu"
    FIGMA = "figma"
    FINAGE = "finage"
    FITBIT = "fitbit"
    FRESHBOOKS = "freshbooks"
    FRESHDESK = "freshdesk"
    FRONT = "front"
    GARMIN = "garmin"
    GITEA = "gitea"
    GITHUB = "github"
    GITHUB_APP = "github_app"
    GITLAB = "gitlab"
    GONG = "gong"
    GOOGLE = "google"
    GOOGLE_GEMINI = "google_gemini"
    GOOGLE_SERVICE_ACCOUNT = "google_service_account"
    GRAFANA = "grafana"
    GROQ = "groq"
    GUMLOOP = "gumloop"
    GUMROAD = "gumroad"
    GUSTO = "gusto"
    HAPPYROBOT = "happyrobot"
    HARVEST = "harvest"
    HELPSCOUT = "helpscout"
    HEROKU = "heroku"
    HEYGEN = "heygen"
    HIGHLEVEL = "highlevel"
    HUBSPOT = "hubspot"
    HUGGINGFACE = "huggingface"
    INSTAGRAM = "instagram"
    INTERCOM = "intercom"
    JINA = "jina"
    JIRA = "jira"
    JOTFORM = "jotform"
    KAKAO = "kakao"
    KEAP = "keap"
    KEYCLOAK = "keycloak"
    KLAVIYO = "klaviyo"
    KRAKEN = "kraken"
    LANGSMITH = "langsmith"
    LEVER = "lever"
    LEVER_SANDBOX = "lever_sandbox"
    LINE = "line"
    LINEAR = "linear"
    LINKEDIN = "linkedin"
    LISTENNOTES = "listennotes"
    MAILCHIMP = "mailchimp"
    MAILGUN = "mailgun"
    MAILJET = "mailjet"
    MARKETO = "marketo"
    MASTODON = "mastodon"
    MATTERMOST = "mattermost"
    MEDIUM = "medium"
    MEM0 = "mem0"
    MERCURY = "mercury"
    MICROSOFT = "microsoft"
    MICROSOFT_CLARITY = "microsoft_clarity"
    MIRO = "miro"
    MISTRAL = "mistral"
    MONDAY = "monday"
    MOONSHOT = "moonshot"
    MURAL = "mural"
    NAVER = "naver"
    NEON = "neon"
    NETLIFY = "netlify"
    NETSUITE = "netsuite"
    NEXTCLOUD = "nextcloud"
    NGROK = "ngrok"
    NOTION = "notion"
    NVIDIA = "nvidia"
    OKTA = "okta"
    ONCEHUB = "oncehub"
    OPENAI = "openai"
    OPENROUTER = "openrouter"
    OPENWEATHERMAP = "openweathermap"
    OURA = "oura"
    OUTREACH = "outreach"
    PAGERDUTY = "pagerduty"
    PANDADOC = "pandadoc"
    PATREON = "patreon"
    PAYPAL = "paypal"
    PERPLEXITY = "perplexity"
    PINECONE = "pinecone"
    PINTEREST = "pinterest"
    PIPEDRIVE = "pipedrive"
    POLAR = "polar"
    POSTHOG = "posthog"
    POSTMARK = "postmark"
    PRODUCTBOARD = "productboard"
    QDRANT = "qdrant"
    QUICKBOOKS = "quickbooks"
    RAILWAY = "railway"
    RAINDROP = "raindrop"
    RAMP = "ramp"
    RAVENSEOTOOLS = "ravenseotools"
    RAZORPAY = "razorpay"
    REDDIT = "reddit"
    REPLICATE = "replicate"
    RESEND = "resend"
    RINGCENTRAL = "ringcentral"
    SALESFORCE = "salesforce"
    SALESLOFT = "salesloft"
    SEMANTIC_SCHOLAR = "semantic_scholar"
    SENDGRID = "sendgrid"
    SENTRY = "sentry"
    SERPAPI = "serpapi"
    SERVICENOW = "servicenow"
    SHOPIFY = "shopify"
    SHORTCUT = "shortcut"
    SLACK = "slack"
    SMARTSHEET = "smartsheet"
    SNOWFLAKE = "snowflake"
    SOUNDCLOUD = "soundcloud"
    SPOTIFY = "spotify"
    SQUARE = "square"
    SQUARESPACE = "squarespace"
    STACKEXCHANGE = "stackexchange"
    STRAVA = "strava"
    STRIPE = "stripe"
    SUPABASE = "supabase"
    SURVEYMONKEY = "surveymonkey"
    TAVILY = "tavily"
    TELEGRAM = "telegram"
    THREADS = "threads"
    TICKTICK = "ticktick"
    TIKTOK = "tiktok"
    TIKTOK_ADS = "tiktok_ads"
    TIMEKIT = "timekit"
    TODOIST = "todoist"
    TOGGL = "toggl"
    TRELLO = "trello"
    TUMBLR = "tumblr"
    TWILIO = "twilio"
    TWITCH = "twitch"
    TYPEFORM = "typeform"
    UBER = "uber"
    VALYU = "valyu"
    VERCEL = "vercel"
    VIMEO = "vimeo"
    VIRUSTOTAL = "virustotal"
    WANDB = "wandb"
    WEAVIATE = "weaviate"
    WEBEX = "webex"
    WEBFLOW = "webflow"
    WECHAT = "wechat"
    WHATSAPP_BUSINESS = "whatsapp_business"
    WHOOP = "whoop"
    WOLFRAM_ALPHA = "wolfram_alpha"
    WOOCOMMERCE = "woocommerce"
    WORDPRESS = "wordpress"
    WORKIOM = "workiom"
    WRIKE = "wrike"
    X = "x"
    XAI = "xai"
    XERO = "xero"
    YAHOO = "yahoo"
    YANDEX = "yandex"
    ZENDESK = "zendesk"
    ZEP = "zep"
    ZINC = "zinc"
    ZOHO = "zoho"
    ZOOM = "zoom"

    @classmethod
    def _missing_(cls, value: object) -> AuthProvider | None:
        if not isinstance(value, str):
            return None
        if value in ALIASES:
            return cls(ALIASES[value])
        if value not in _own_ids:
            return None
        member = str.__new__(cls, value)
        member._name_ = value.upper()
        member._value_ = value
        return cls._value2member_map_.setdefault(value, member)  # type: ignore[return-value]

    def __str__(self) -> str:
        return str(self.value)


def is_id(value: object) -> bool:
    """Whether *value* can be the id of a provider."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def canonical(provider: str) -> str:
    """Return the id that a provider, perhaps named by an alias, is stored under."""
    value = str(provider.value) if isinstance(provider, Enum) else provider
    return ALIASES.get(value, value)


def register_id(provider: str) -> str:
    """Admit *provider* as a value of `AuthProvider`; return the plain id."""
    value = str(provider.value) if isinstance(provider, Enum) else provider
    if not is_id(value):
        raise ConfigurationError(
            f"{value!r} is no provider id: use a-z, 0-9, '-' and '_', 64 at most"
        )
    if value not in AuthProvider._value2member_map_:
        _own_ids.add(value)
    return value
