"""The rules of the threat model and the cases of the reliability plan, with their tests."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# Rule, what it says, and below it the tests that fail when it is broken: "file::test",
# both without "test_". Numbers as in the rules of security (A1) and reliability (C3).
TABLE = """
A1.1 PKCE with S256 on every flow, a verifier of its own
    security_rules::every_click_has_a_challenge_and_a_state_of_its_own
    security_rules::verifier_is_long_enough_and_fits_its_challenge
    spec_handlers::verifiers_of_two_tabs_are_apart
    callbacks::code_for_another_attempts_state_is_worthless
A1.2 state: 256 random bits, hashed at rest, ten minutes, once
    security_rules::every_click_has_a_challenge_and_a_state_of_its_own
    security_rules::store_holds_nothing_in_clear
    callbacks::answer_that_does_not_fit_is_refused_and_burns_nothing
    callbacks::other_code_for_a_used_state_is_a_replay
    callbacks::late_answer_is_told_so
    quarantine::flood_of_clicks_leaves_a_handful_of_attempts
A1.3 no redirect URI, issuer, endpoint or scope from a request
    callbacks::redirect_uri_is_never_taken_from_the_request
    states::wrong_settings_are_refused_when_they_are_given
    public::address_comes_from_public_url_whatever_the_proxy_does
    public::public_pocket_that_is_not_safe_is_refused_when_it_is_made
    security_rules::request_cannot_name_another_owner
A1.4 only https (or loopback http) authorization and verification URLs
    security_rules::address_no_secret_may_go_to_is_refused
    discovery::endpoint_that_secrets_may_not_go_to_is_refused
    device::person_is_not_sent_to_an_insecure_page
    pages::nobody_is_sent_to_anything_but_a_web_page
A1.5 the minimum of scopes; an upgrade never harms the session
    agents::more_scopes_are_asked_for_and_never_cost_what_is_there
    states::pending_upgrade_leaves_the_working_session_alone
    states::consent_to_less_does_not_replace_a_session_that_grants_more
A1.6 pushed authorization requests where the server takes them
    requests::pushed_request_is_not_in_the_address
    requests::used_address_is_started_anew_from_the_link
    requests::refused_push_is_a_page_and_the_link_works_again
A1.7 dynamic registrations by issuer, sealed, renewed when they expire
    discovery::registered_client_is_used_again
    discovery::expired_client_registers_again
    discovery::clients_of_two_tenants_are_kept_apart
    provider_attacks::client_of_one_tenant_is_not_sent_to_another
A1.8 everything is compared before anything is consumed
    callbacks::answer_that_does_not_fit_is_refused_and_burns_nothing
    public::answer_from_another_person_or_browser_is_refused_and_burns_nothing
    quarantine::answer_of_another_user_leaves_the_attempt_to_its_owner
    quarantine::consent_of_a_victim_never_reaches_who_sent_the_link
A1.9 mix-up: iss is compared exactly, for errors too
    callbacks::answer_that_does_not_fit_is_refused_and_burns_nothing
    openid::issuer_is_compared_exactly
    discovery::issuer_promised_in_answers_is_missed
A1.10 a callback path for each connection
    callbacks::answer_of_another_provider_stays_with_its_own
    spec_handlers::foreign_state_at_an_own_endpoint_is_refused
A1.11 error answers end the attempt with a page
    callbacks::error_answer_is_a_page_and_the_link_works_again
    spec_handlers::denial_without_a_code_is_a_page
A1.12 doubled, oversized or odd parameters are refused
    callbacks::answer_that_does_not_fit_is_refused_and_burns_nothing
    callbacks::markup_in_a_parameter_is_never_echoed
A1.13 pages are static, escaped, and leave the URL with the code
    pages::every_page_carries_all_security_headers
    pages::markup_in_any_value_is_shown_as_text
    callbacks::markup_in_a_parameter_is_never_echoed
    callbacks::every_answer_keeps_to_itself
    connections::what_others_named_is_shown_as_text
    server_fuzz::no_request_breaks_the_server_or_is_echoed
A1.14 HEAD, OPTIONS, prefetch and link scanners change nothing
    callbacks::other_methods_of_the_callback_change_nothing
    callbacks::prefetch_of_the_callback_changes_nothing
    callbacks::link_scanners_start_and_use_up_nothing
    public::link_scanners_begin_and_use_up_nothing
A1.15 our own POSTs come from our own pages
    callbacks::other_sites_cannot_press_the_button
    forms::other_sites_cannot_submit
    public::other_sites_cannot_press_the_button
    connections::button_on_another_site_does_nothing
A1.16 loopback listens on this machine only, and stops
    callbacks::server_listens_on_this_machine_only
    callbacks::server_stops_and_starts_cleanly
A1.17 a taken port is an error before any link
    callbacks::taken_port_is_an_error_before_any_link
A1.18 loopback answers to names of this machine only
    callbacks::foreign_host_names_are_refused
    forms::other_names_of_this_host_are_refused
A1.19 token requests: https, no redirects, bounded in time and size
    security_rules::redirect_of_a_token_request_is_not_followed
    refresh::trouble_keeps_the_session_and_the_token_while_it_is_valid
    security_rules::address_no_secret_may_go_to_is_refused
A1.20 a 200 without an access token is an error
    refresh::trouble_keeps_the_session_and_the_token_while_it_is_valid
    provider_attacks::odd_token_answer_is_an_error_of_the_provider
A1.21 token_type bearer in any case; scope as granted, no loops
    provider_attacks::odd_token_answer_is_an_error_of_the_provider
    agents::withheld_scope_is_a_result_and_no_loop
    scope_answers::scope_that_an_answer_lacks_is_withheld
A1.22 a new refresh token replaces the old one, none keeps it
    refresh::refresh_token_of_the_next_renewal_is_the_right_one
A1.23 resource in every request, and sessions of two resources apart
    requests::resource_is_named_in_every_request
    requests::session_for_one_resource_is_not_taken_for_another
A1.24 credentials go to declared hosts only, and follow no redirect
    clients::credential_does_not_follow_a_redirect
    clients::client_of_an_unknown_api_wants_its_hosts
    clients::setting_that_would_send_it_elsewhere_is_refused
A1.25 one client authentication, form-encoded
    security_rules::odd_client_secrets_arrive_as_they_are
    row_mutations::secret_that_is_not_encoded_is_refused
A1.26 revocation: local first, retried from an outbox
    states::deleting_revokes_the_grant_at_the_provider
    states::deleting_works_here_although_the_provider_is_down
    outbox::grant_is_given_back_when_the_provider_listens_again
    outbox::what_a_killed_process_has_begun_is_finished
    quarantine::grant_whose_time_is_over_is_given_back
A1.27 metadata is of the issuer that was asked
    discovery::metadata_for_another_issuer_is_not_used
    discovery::person_meets_a_page_where_the_issuer_lies
A1.28 metadata is looked for in the order of the RFCs
    discovery::metadata_is_found_wherever_it_may_be
A1.29 metadata does not lead into private networks
    discovery::public_server_does_not_lead_to_this_machine
    requests::name_that_leads_into_a_private_network_is_not_connected_to
    requests::looked_at_address_is_the_one_connected_to
A1.30 device polls: interval, slow_down, end
    device::questions_are_as_far_apart_as_the_server_wants
    device::nothing_is_asked_after_a_final_answer
    device::code_that_ran_out_is_not_asked_about
    device::interval_is_five_seconds_unless_said
A1.31 no device flow in public unless opted in
    quarantine::ways_that_show_nobody_are_off_in_public
A1.32 forms: in the body, once, bounded, never echoed
    forms::no_value_shows_anywhere
    forms::second_submit_changes_nothing
    forms::body_that_is_no_form_of_ours_is_refused
    forms::no_parameter_is_reflected
    public::form_is_the_right_persons_only
A1.33 a form belongs to its connection
    forms::attempt_belongs_to_its_own_form
A1.34 the model and resume values name no owner
    security_rules::request_cannot_name_another_owner
    owners::two_users_never_see_each_others_tokens
    langgraph_server::users_are_asked_and_served_apart_whatever_their_apps_claim
    resumes::forged_answer_grants_nothing_and_breaks_nothing
A1.35 no default identity in public
    owners::unknown_owner_ends_the_run
    langgraph_server::open_server_guesses_no_owner
    quarantine::nobody_is_somebody_by_default
    connections::where_many_are_served_nobody_is_the_default
A1.36 store keys are exact, whatever is in them
    reliability::owners_of_odd_names_never_meet
A1.37 a resume value is a hint
    agents::any_answer_is_a_wake_up_and_grants_nothing
    resumes::forged_answer_grants_nothing_and_breaks_nothing
A1.38 running again from the top asks once
    states::prepare_gives_one_link_however_often_it_is_called
    agents::no_answer_at_all_looks_again
A1.39 the interrupt payload holds no secret of the protocol
    no_leaks::no_secret_shows_anywhere
    security_rules::whole_flow_tells_no_log_and_no_error_a_secret
A1.40 starts and rows are bounded
    security_rules::many_starts_leave_one_future_and_bounded_rows
    public::thousand_starts_leave_a_bounded_number_of_records
    public::address_that_guesses_is_stopped_where_the_server_knows_it
    public::count_is_of_a_minute_and_of_a_bounded_number_of_names
C3.1 the owner of a lease dies before its request
    reliability::lease_of_a_dead_process_is_taken_over
    housekeeping::lease_of_a_dead_process_ends_by_itself
C3.2 an answer is lost, or its process dies before the save
    refresh::lost_answer_is_asked_for_once_more
    campaign::short_campaign_loses_nothing_and_leaves_no_process
C3.3 the process dies between exchange and save
    kill::killed_app_goes_on_where_it_was
    callbacks::exchange_that_died_is_failed_in_the_end_and_its_code_never_sent_again
    quarantine::grant_of_a_replica_that_died_is_given_back_or_stays
C3.4 the process dies between callback and resume
    kill::killed_app_goes_on_where_it_was
    restart::pause_is_resumed_by_a_new_process
C3.5 a lost callback leaves the same link until it expires
    states::prepare_gives_one_link_however_often_it_is_called
    callbacks::expired_link_is_told_so
    states::waiters_that_gave_up_leave_nothing_behind
C3.6 a duplicate callback exchanges once
    callbacks::ten_identical_callbacks_at_once_exchange_once
C3.7 a late callback is told so and asks nothing
    callbacks::late_answer_is_told_so
C3.8 a denial is a result, and no loop
    callbacks::error_answer_is_a_page_and_the_link_works_again
    agents::refused_connection_becomes_a_result_and_the_rest_runs
C3.9 resumed before the consent it waits with the same link
    agents::any_answer_is_a_wake_up_and_grants_nothing
    resumes::same_resume_before_and_after_the_consent_counts_once
C3.10 a clock that is wrong makes no storm; a 401 is renewed once
    reliability::wrong_clock_makes_no_storm
    clients::refused_token_is_renewed_once_and_the_call_repeated
    clients::api_that_takes_no_token_costs_one_renewal
C3.11 transient trouble keeps the session and never asks
    refresh::trouble_keeps_the_session_and_the_token_while_it_is_valid
    refresh::retry_after_is_honoured_up_to_a_minute
    security_rules::retry_after_is_read_or_left_alone
    security_rules::deeply_nested_answer_is_no_answer
C3.12 a grant that is over asks, once somebody else has not renewed it
    refresh::grant_that_is_over_needs_consent_and_keeps_its_record
    refresh::session_renewed_between_read_and_lease_is_not_renewed_again
C3.13 a refused app logs nobody out
    refresh::refused_app_is_the_developers_trouble_and_logs_nobody_out
C3.14 refusals nobody can read ask after three
    refresh::refusals_nobody_can_read_end_in_consent_after_three
C3.15 more scopes are asked for as a union, bounded
    clients::scope_that_the_api_misses_is_asked_for
    agents::more_scopes_are_asked_for_and_never_cost_what_is_there
    agents::withheld_scope_is_a_result_and_no_loop
C3.16 a store outage on read is no missing session
    reliability::store_that_is_away_is_no_missing_session
    postgres::calls_survive_a_restart_of_the_server
    redis::restart_is_an_outage_that_ends
C3.17 a store outage on save keeps the new token
    refresh::token_that_cannot_be_saved_is_used_and_saved_later
    refresh::token_that_cannot_be_saved_gets_a_last_chance_on_closing
    quarantine::grant_that_cannot_be_stored_is_not_lost
C3.18 a session removed or replaced during a refresh
    refresh::session_deleted_during_a_refresh_does_not_come_back
    refresh::new_consent_during_a_refresh_wins
    connections::grant_stored_while_it_is_disconnected_does_not_stay
C3.19 a cancelled caller stops nobody
    refresh::cancelled_callers_do_not_stop_the_refresh
    loops::cancelled_wait_ends_at_once_and_disturbs_nobody
C3.20 two replicas behind a load balancer
    replicas::any_replica_serves_any_step
C3.21 records of another version of the package
    housekeeping::question_of_another_version_counts_as_expired
    housekeeping::pause_of_another_version_is_begun_anew
    housekeeping::session_of_another_version_is_no_missing_session
C3.22 many at once share one link and one pause
    states::ten_first_prepares_at_once_agree_on_one_link
    states::thirty_conversations_that_pause_at_once_share_one_link
C3.23 no new grants where there is one
    states::prepare_gives_one_link_however_often_it_is_called
    callbacks::first_success_of_two_tabs_wins
    refresh::grant_that_is_over_needs_consent_and_keeps_its_record
C3.24 a server that cannot listen is an error before the link
    callbacks::taken_port_is_an_error_before_any_link
    callbacks::server_stops_and_starts_cleanly
C3.25 forks, several loops, synchronous callers
    loops::forked_processes_use_the_pocket_as_their_parent_does
    loops::run_that_paused_on_one_loop_goes_on_on_another
    kill::forked_child_opens_a_loop_and_a_store_of_its_own
    loops::threads_that_run_graphs_at_once_share_link_and_token
B1 everything at rest is sealed, bound to its row, under keys that rotate
    security_rules::store_holds_nothing_in_clear
    security_rules::used_attempt_keeps_neither_verifier_nor_answer
    security_rules::sealed_record_opens_as_it_was_made_or_not_at_all
    security_rules::empty_record_is_unreadable_and_not_a_crash
    security_rules::default_store_and_key_are_the_users_own
    states::row_that_does_not_belong_there_is_unreadable
    keys::everything_outlives_the_key_it_was_sealed_with
    keys::replica_without_the_new_key_says_so_and_asks_nobody
B2 a token is in no log, page, error, repr, checkpoint or trace
    security_rules::whole_flow_tells_no_log_and_no_error_a_secret
    security_rules::context_of_a_tool_shows_its_token_in_no_default_way
    security_rules::cookie_of_one_persons_answer_is_not_sent_for_the_next
    security_rules::unreachable_provider_is_told_without_the_request
    security_rules::import_does_nothing
    no_leaks::no_secret_shows_anywhere
"""


def rules() -> dict[str, tuple[str, list[str]]]:
    """Return what each rule says, and its tests."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in TABLE.strip().splitlines():
        if line.startswith(" "):
            found[next(reversed(found))][1].append(line.strip())
        else:
            number, _, says = line.partition(" ")
            found[number] = (says, [])
    return found


RULES = rules()

# Files that are about the rules alone: each of their tests has to stand above.
FILES = ("security_rules",)


@cache
def names_in(file: str) -> dict[str, bool]:
    """Return the tests of a file by their short names, and whether they always run."""
    tree = ast.parse((TESTS / f"test_{file}.py").read_text())
    return {
        node.name.removeprefix("test_"): not any(
            "skip" in ast.unparse(decorator) for decorator in node.decorator_list
        )
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.name.startswith("test_")
    }


def by_test() -> dict[str, list[str]]:
    """Return the rules that each test stands for."""
    found = defaultdict(list)
    for rule, (_, tests) in RULES.items():
        for test in tests:
            found[test].append(rule)
    return found


def test_no_rule_is_missing() -> None:
    """All forty rules and twenty-five cases are here, in order."""
    wanted = [f"A1.{n}" for n in range(1, 41)] + [f"C3.{n}" for n in range(1, 26)]
    assert [rule for rule in RULES if "." in rule] == wanted


@pytest.mark.parametrize("rule", RULES)
def test_rule_has_a_test(rule: str) -> None:
    """Each rule names tests, which exist and always run."""
    says, tests = RULES[rule]
    assert says
    assert tests, f"{rule}, {says}: no test"
    for test in tests:
        file, _, name = test.partition("::")
        assert names_in(file).get(name), f"{rule}: {test} is missing or skipped"


@pytest.mark.parametrize("file", FILES)
def test_test_of_a_rule_names_it(file: str) -> None:
    """What is written for the rules stands in their table."""
    known = by_test()
    unnamed = [name for name in names_in(file) if f"{file}::{name}" not in known]
    assert not unnamed


if __name__ == "__main__":
    for rule, (says, tests) in RULES.items():
        print(f"{rule:6} {says}")
        for test in tests:
            print(f"         {test}")
    print()
    for test, rules in sorted(by_test().items()):
        print(f"{test}: {', '.join(rules)}")
