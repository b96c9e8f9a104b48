-- The ledger's role, database and tables, made at the first start and brought up to date at every other one.
-- The role reads and adds lines, and no more: what it is given belongs to the superuser that runs this.
\getenv word LEDGER_PASSWORD
SELECT 'CREATE ROLE ledger' WHERE to_regrole('ledger') IS NULL \gexec
ALTER ROLE ledger LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOINHERIT NOREPLICATION PASSWORD :'word';
SELECT 'CREATE DATABASE ledger' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'ledger') \gexec
-- A role that made its tables itself owned all of it.
ALTER DATABASE ledger OWNER TO CURRENT_USER;

-- Into no other database, MLflow's least of all.
REVOKE ALL ON DATABASE heldout, ledger, postgres, template1 FROM PUBLIC, ledger;
GRANT CONNECT ON DATABASE ledger TO ledger;

\connect ledger
REASSIGN OWNED BY ledger TO CURRENT_USER;

-- As search/guard/database_chain.py makes them where nobody has; a test compares them.
CREATE TABLE IF NOT EXISTS heldout_ledger (number bigint PRIMARY KEY, line text NOT NULL);
CREATE TABLE IF NOT EXISTS heldout_ledger_rows (digest text PRIMARY KEY, hashes bytea NOT NULL);
CREATE OR REPLACE FUNCTION heldout_ledger_stays() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'a ledger is only added to'; END $$;
CREATE OR REPLACE TRIGGER heldout_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON heldout_ledger
    FOR EACH STATEMENT EXECUTE FUNCTION heldout_ledger_stays();
CREATE OR REPLACE TRIGGER heldout_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON heldout_ledger_rows
    FOR EACH STATEMENT EXECUTE FUNCTION heldout_ledger_stays();

REVOKE ALL ON heldout_ledger, heldout_ledger_rows FROM PUBLIC, ledger;
GRANT SELECT, INSERT ON heldout_ledger, heldout_ledger_rows TO ledger;
